"""Sharing neurons along curves, the key of a checkpoint, and the curves' file."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from griffin_offload.allocation import (
    Curves,
    calibration_path,
    checkpoint_key,
    load_curves,
    save_curves,
    share_neurons,
)
from griffin_offload.errors import CheckpointError, GriffinError
from griffin_offload.selection import kept_neurons
from griffin_offload.weights.checkpoint import Checkpoint

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEEP, FLAT = (8.0, 4.0, 2.0, 1.0, 0.0), (0.5, 0.375, 0.25, 0.125, 0.0)


def curves(*kl: tuple[float, ...], shares: tuple[float, ...] = QUARTERS) -> Curves:
    return Curves("0123456789abcdef0123", shares, kl, "ab" * 32, 384, 128, 2, "bfloat16")


def random_curves(layers: int, seed: int) -> Curves:
    """Noisy, and neither convex nor monotone."""
    noise = torch.rand((layers, 9), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = tuple((*row[:-1], 0.0) for row in noise.tolist())
    return curves(*rows, shares=tuple(i / 8 for i in range(9)))


# Sharing


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.731, 0.9, 1])
@pytest.mark.parametrize("neurons", [(96, 96, 96, 96), (7, 100, 1, 33), (1536, 1024, 768, 512)])
@pytest.mark.parametrize("seed", range(5))
def test_the_total_is_that_of_the_same_share_everywhere(sparsity: float, neurons: tuple[int, ...], seed: int) -> None:
    kept = share_neurons(random_curves(4, seed), neurons, sparsity)
    assert sum(kept) == sum(kept_neurons(count, sparsity) for count in neurons)
    assert all(0 <= k <= count for k, count in zip(kept, neurons, strict=True))


def test_all_and_none() -> None:
    assert share_neurons(curves(STEEP, FLAT), (8, 12), 0) == (8, 12)
    assert share_neurons(curves(STEEP, FLAT), (8, 12), 1) == (0, 0)


def test_the_layer_that_needs_them_gets_them() -> None:
    assert share_neurons(curves(FLAT, STEEP), (8, 8), 0.5) == (0, 8)
    assert share_neurons(curves(STEEP, FLAT), (8, 8), 0.5) == (8, 0)


def test_equal_curves_and_ties_go_to_the_first_layer() -> None:
    assert share_neurons(curves(STEEP, STEEP), (8, 8), 0.5) == (4, 4)
    assert share_neurons(curves(STEEP, STEEP), (8, 8), 5 / 8) == (4, 2)
    assert share_neurons(curves(FLAT, FLAT), (8, 8), 0.5) == (8, 0)  # straight lines: one piece each


def test_the_last_piece_is_taken_in_part() -> None:
    assert share_neurons(curves(STEEP, FLAT), (5, 8), 0.5) == (5, 1)
    assert share_neurons(curves(STEEP, FLAT), (8, 8), 0.25) == (8, 4)


def test_a_layer_with_many_neurons_pays_more_for_the_same_fall() -> None:
    assert share_neurons(curves(STEEP, STEEP), (80, 8), 0.875) == (3, 8)


def test_a_cliff_behind_a_plateau_is_seen() -> None:
    """The first neurons bring nothing, those after them everything: a step at a time would never get there."""
    cliff = (1.0, 1.0, 1.0, 0.0, 0.0)
    assert share_neurons(curves(FLAT, cliff), (8, 8), 0.5) == (2, 6)


def test_a_rise_is_noise() -> None:
    bump = (8.0, 1.0, 3.0, 2.0, 0.0)  # as if the three after the first brought nothing
    assert share_neurons(curves(bump, FLAT), (8, 8), 0.5) == share_neurons(
        curves((8.0, 1.0, 1.0, 1.0, 0.0), FLAT), (8, 8), 0.5
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_other_sharing_is_better_on_convex_curves(seed: int) -> None:
    """Against every sharing of 16 quarters, where the losses add up."""
    falls = torch.rand((4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = falls.sort(dim=1).values.cumsum(1).flip(1).tolist()
    convex = curves(*((*row, 0.0) for row in rows))
    for total in range(1, 16):
        kept = share_neurons(convex, (4, 4, 4, 4), 1 - total / 16)
        possible = (ks for ks in itertools.product(range(5), repeat=4) if sum(ks) == sum(kept))
        best = min(sum(convex.kl[i][k] for i, k in enumerate(ks)) for ks in possible)
        assert sum(convex.kl[i][k] for i, k in enumerate(kept)) == pytest.approx(best)


def test_curves_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of 2 layers, the model has 3"):
        share_neurons(curves(STEEP, FLAT), (8, 8, 8), 0.5)


def test_a_curve_between_its_points() -> None:
    one = curves(STEEP)
    assert [one.at(0, share) for share in (0, 0.125, 0.5, 0.9, 1)] == pytest.approx([8, 6, 2, 0.4, 0])


# The key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "llama", shards=2)


def key(folder: Path) -> str:
    return checkpoint_key(Checkpoint.open(folder))


def test_a_checkpoint_keeps_its_key_wherever_it_is(folder: Path, tmp_path: Path) -> None:
    before = key(folder)
    assert len(before) == 64
    shutil.copytree(folder, tmp_path / "copy")
    assert key(tmp_path / "copy") == before
    assert key(folder.rename(tmp_path / "moved")) == before


def test_another_checkpoint_has_another_key(folder: Path, tmp_path: Path) -> None:
    keys = [key(folder)]
    keys.append(key(tiny_checkpoint(tmp_path / "seed", "llama", shards=2, seed=1)))  # other weights, same headers
    keys.append(key(tiny_checkpoint(tmp_path / "dtype", "llama", shards=2, dtype=torch.bfloat16)))
    keys.append(key(tiny_checkpoint(tmp_path / "one", "llama")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    keys.append(key(folder))
    assert len(set(keys)) == len(keys)


def test_a_tensor_of_no_bytes_has_a_key_too(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    before = key(folder)
    tensors = load_file(file)
    save_file({**tensors, "model.empty": torch.zeros(0)}, file)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.empty"] = file.name
    index.write_text(json.dumps(content))
    assert key(folder) != before


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
    "a list": ([1], "indices"),
    "no curves": ({**GOOD, "kl": []}, "a layer"),
    "a row too short": ({**GOOD, "kl": [[1.0, 0.0], list(FLAT)]}, "one value for each of its 5 shares"),
    "NaN": ({**GOOD, "kl": [[float("nan")] * 5]}, "finite"),
    "text for a number": ({**GOOD, "kl": [["1"] * 5]}, "finite"),
    "a number for a row": ({**GOOD, "kl": [1, 2]}, "finite"),
    "a number for all": ({**GOOD, "kl": 1}, "iterable"),
    "shares that fall": ({**GOOD, "shares": [0, 0.5, 0.25, 0.75, 1]}, "ascend"),
    "shares that end early": ({**GOOD, "shares": [0, 0.1, 0.2, 0.3, 0.4]}, "ascend"),
    "no share": ({**GOOD, "shares": []}, "ascend"),
    "no key": ({name: GOOD[name] for name in GOOD if name != "key"}, "'key' is missing"),
    "a key of another kind": ({**GOOD, "key": 7}, "7 is not a text"),
    "no window": ({**GOOD, "windows": 0}, "0 is not a count"),
    "half a token": ({**GOOD, "prompt_tokens": 1.5}, "1.5 is not a count"),
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
