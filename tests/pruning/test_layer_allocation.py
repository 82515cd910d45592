"""Sharing neurons along curves, and the curves' file."""

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin_offload.errors import CheckpointError, GriffinError
from griffin_offload.pruning.layer_allocation import (
    LEAST,
    RATE,
    STEPS,
    Curves,
    calibration_path,
    load_curves,
    save_curves,
    share_neurons,
)
from griffin_offload.pruning.selection import kept_neurons

SHARES = (0.25, 0.5, 0.75, 1.0)
STEEP, FLAT = (1.8, 1.0, 0.6, 0.4), (1.1, 1.0, 0.95, 0.925)  # eight times as far from 1


def curves(*kl: tuple[float, ...]) -> Curves:
    return Curves("0123456789abcdef0123", SHARES, 0.5, kl, "ab" * 32, 384, 64, 4, "bfloat16")


def weighted(*weights: float) -> Curves:
    """Curves whose weights are these, over their mean."""
    return curves(*(tuple(1 + weight * (value - 1) for value in FLAT) for weight in weights))


def random_curves(layers: int, seed: int) -> Curves:
    """Noisy, and neither convex nor monotone; one common point."""
    noise = torch.rand((layers, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise[:, 1] = 0.5
    return curves(*map(tuple, noise.tolist()))


# Sharing


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.731, 0.9, 1])
@pytest.mark.parametrize("neurons", [(96, 96, 96, 96), (7, 100, 1, 33), (1536, 1024, 768, 512)])
@pytest.mark.parametrize("seed", range(5))
def test_the_total_is_that_of_the_same_share_everywhere(sparsity: float, neurons: tuple[int, ...], seed: int) -> None:
    kept = share_neurons(random_curves(4, seed), neurons, sparsity)
    assert sum(kept) == sum(kept_neurons(count, sparsity) for count in neurons)
    assert all(0 <= k <= count for k, count in zip(kept, neurons, strict=True))


def test_the_numbers_are_few() -> None:
    kept = share_neurons(random_curves(24, 1), [1536] * 24, 0.5)
    assert sum(k % 96 > 0 for k in kept) <= 1
    assert 3 < len(set(kept)) <= 17


def test_all_and_none() -> None:
    assert share_neurons(curves(STEEP, FLAT), (8, 12), 0) == (8, 12)
    assert share_neurons(curves(STEEP, FLAT), (8, 12), 1) == (0, 0)


def test_weights_are_the_factors_on_the_average_layer() -> None:
    assert curves(STEEP, FLAT).weights == pytest.approx((16 / 9, LEAST))  # not 2 / 9
    assert weighted(1, 2, 3, 6).weights == pytest.approx((1 / 3, 2 / 3, 1, 2))
    assert weighted(1, 2, -3, 12).weights == pytest.approx((1 / 3, 2 / 3, LEAST, 4))  # noise: never below LEAST


def test_without_a_change_all_layers_are_equal() -> None:
    flat = curves((1, 1, 1, 1), (1, 1, 1, 1))
    assert flat.weights == (1, 1)
    assert share_neurons(flat, (8, 8), 0.5) == (4, 4)


def test_a_weight_is_worth_its_logarithm() -> None:
    kept = share_neurons(weighted(1, 2, 4), (1000, 1000, 1000), 0.5)
    step = 1000 * math.log(2) / RATE
    assert kept == pytest.approx((500 - step, 500, 500 + step), abs=1000 / STEPS)


def test_what_does_not_fit_a_layer_goes_to_the_others() -> None:
    heavy, light, other = share_neurons(weighted(1e6, 1, 1), (100, 100, 100), 0.3)
    assert (heavy, light + other) == (100, 110)
    assert share_neurons(weighted(1e6, 1e6, 1), (100, 100, 100), 0.875) == (18, 18, 0)


def test_the_layer_that_needs_them_gets_them() -> None:
    first, second = share_neurons(curves(FLAT, STEEP), (80, 80), 0.5)
    assert second > first
    assert share_neurons(curves(STEEP, FLAT), (80, 80), 0.5) == (second, first)


def test_equal_layers_share_equally_and_the_odd_one_is_the_first_layers() -> None:
    assert share_neurons(curves(STEEP, STEEP), (8, 8), 0.5) == (4, 4)
    assert share_neurons(curves(STEEP, STEEP, STEEP), (7, 7, 8), 0.5) == (3, 3, 4)
    assert share_neurons(curves(STEEP, STEEP), (80, 8), 0.875) == (10, 1)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_sharing_is_better_where_losses_are_exponential(seed: int) -> None:
    """Against every sharing of four layers of six neurons."""
    weights = (8 ** torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).tolist()
    shared = weighted(*weights)

    def loss(kept: tuple[int, ...]) -> float:
        return sum(weight * math.exp(-RATE * k / 6) for weight, k in zip(shared.weights, kept, strict=True))

    for total in range(1, 24):
        kept = share_neurons(shared, (6, 6, 6, 6), 1 - total / 24)
        best = min(loss(ks) for ks in itertools.product(range(7), repeat=4) if sum(ks) == sum(kept))
        assert loss(kept) <= 1.1 * best  # whole neurons: the rounding is not searched


def test_curves_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of 2 layers, the model has 3"):
        share_neurons(curves(STEEP, FLAT), (8, 8, 8), 0.5)


# The file


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = calibration_path(tmp_path, "0123456789abcdef0123")
    assert path == tmp_path / "calibration" / "0123456789abcdef.json"
    assert load_curves(path) is None
    save_curves(path, curves(STEEP, FLAT))
    assert load_curves(path) == curves(STEEP, FLAT)
    save_curves(path, curves(FLAT))
    assert load_curves(path) == curves(FLAT)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing is left of the writing


GOOD = json.loads(json.dumps(asdict(curves(STEEP, FLAT))))
BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (None, "Expecting value"),
    "a list": ([1], "it is no JSON object but a list"),
    "no curves": ({**GOOD, "kl": []}, "a layer"),
    "a row too short": ({**GOOD, "kl": [[1.0, 0.0], list(FLAT)]}, "one value for each of its 4 shares"),
    "NaN": ({**GOOD, "kl": [[float("nan")] * 4]}, "finite"),
    "text for a number": ({**GOOD, "kl": [["1"] * 4]}, "a number of kl is not a number but a text"),
    "a number for a row": ({**GOOD, "kl": [1, 2]}, "kl is not a list but a whole number"),
    "a number for all": ({**GOOD, "kl": 1}, "kl is not a list"),
    "shares that fall": ({**GOOD, "shares": [0.5, 0.25, 0.75, 1]}, "ascend"),
    "shares above 1": ({**GOOD, "shares": [0.25, 0.5, 0.75, 1.25]}, "ascend"),
    "others elsewhere": ({**GOOD, "others": 0.6}, "0.6 is none of its shares"),
    "no share": ({**GOOD, "shares": []}, "ascend"),
    "no key": ({name: GOOD[name] for name in GOOD if name != "key"}, "key is missing"),
    "a key of another kind": ({**GOOD, "key": 7}, "key is not a text but a whole number"),
    "no window": ({**GOOD, "windows": 0}, "no tokens"),
    "half a token": ({**GOOD, "prompt_tokens": 1.5}, "prompt_tokens is not a whole number but a number"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_a_damaged_file_is_named(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    path.write_text("" if content is None else json.dumps(content))
    with pytest.raises(GriffinError) as caught:
        load_curves(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a calibration (")
    assert reason in message
    assert message.endswith("`griffin calibrate --force` writes a new one")
    assert "\n" not in message


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="is not a calibration"):
        load_curves(tmp_path)


def test_curves_do_not_change() -> None:
    assert replace(curves(STEEP), windows=3) != curves(STEEP)
    with pytest.raises(AttributeError):
        curves(STEEP).windows = 3  # type: ignore[misc]
