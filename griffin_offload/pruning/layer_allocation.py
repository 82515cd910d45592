"""Shares the kept neurons over the layers, by curves that `evaluation/calibrate.py` measures once per checkpoint.

The paper keeps the same share of every layer. The curves say how the output's KL divergence from the full model's
changes if one layer keeps more or fewer of its neurons than the others.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, GriffinError
from ..files import reason, write_text
from ..small_json import as_kind, need, read_object
from .selection import kept_neurons

RATE = 5.0  # a layer's loss falls as exp(-RATE share); 3 to 8 do about as well on two models (docs/results.md)
STEPS = 16  # of a layer: every size of a matrix takes a kernel of its own, and with it memory
MOST = 1e6  # nats of a divergence that can be true
LEAST = 0.25  # the least weight of a layer; the average is 1. With 0.05 some layers kept no neuron (docs/results.md)


@dataclass(frozen=True)
class Curves:
    """How much a checkpoint's output depends on the neurons of each layer.

    kl[i][j]: KL divergence in nats from the full model, if layer i keeps `shares[j]` of its neurons and every other
    layer `others`, chosen by the prompt; the mean over the continuation tokens of all windows. `shares` ascend in
    [0, 1]; `others` is one of them. The other fields say how it was measured, and on which text."""

    key: str
    shares: tuple[float, ...]
    others: float
    kl: tuple[tuple[float, ...], ...]
    text_sha256: str
    prompt_tokens: int
    continue_tokens: int
    windows: int
    dtype: str

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each layer's neurons, about 1 on average.

        It is the factor, by least squares, from the average layer's changes of the KL (against share `others`) to the
        layer's own. A short text gives no more than one number per layer: sharing by single points did worse."""
        common = self.shares.index(self.others)
        changes = [[value - row[common] for value in row] for row in self.kl]
        average = [sum(column) / len(changes) for column in zip(*changes, strict=True)]
        square = sum(change**2 for change in average)
        if not square:
            return (1.0,) * len(changes)
        fits = (sum(ours * mean for ours, mean in zip(row, average, strict=True)) / square for row in changes)
        return tuple(max(fit, LEAST) for fit in fits)


def share_neurons(curves: Curves, neurons: Sequence[int], sparsity: float) -> tuple[int, ...]:
    """Kept neurons of each layer, k_i <= neurons[i]; their sum is that of the same share of every layer.

    If layer i, of F_i neurons and weight a_i, loses F_i a_i exp(-RATE k_i / F_i), the least total loss has
    k_i = F_i (c + ln(a_i) / RATE) within [0, F_i], with one c for all layers. Rounded, so that few of them differ."""
    if len(neurons) != len(curves.kl):
        raise CheckpointError(f"the calibration is of {len(curves.kl)} layers, the model has {len(neurons)}")
    total = sum(kept_neurons(count, sparsity) for count in neurons)
    ahead = [math.log(weight) / RATE for weight in curves.weights]

    def wanted(level: float) -> list[float]:
        return [count * min(1.0, max(0.0, level + more)) for count, more in zip(neurons, ahead, strict=True)]

    low, high = -max(ahead), 1 - min(ahead)  # nothing, and everything
    for _ in range(60):  # finds the highest level with no more whole neurons than the total
        middle = (low + high) / 2
        if sum(map(int, wanted(middle))) <= total:
            low = middle
        else:
            high = middle
    return _in_steps(wanted(low), neurons, total)


def _in_steps(shares: Sequence[float], neurons: Sequence[int], total: int) -> tuple[int, ...]:
    """Shares rounded to steps of 1/STEPS of a layer, all but one, so that they sum up to `total`: the layers that are
    furthest below their share get one step more."""
    steps = [max(1, count // STEPS) for count in neurons]
    kept = [int(share // step) * step for share, step in zip(shares, steps, strict=True)]
    below = sorted(range(len(kept)), key=lambda i: (kept[i] - shares[i]) / steps[i])
    while (left := total - sum(kept)) > 0:
        for layer in below:
            more = min(steps[layer], left, neurons[layer] - kept[layer])
            kept[layer] += more
            left -= more
    return tuple(kept)


def calibration_path(cache_folder: Path, key: str) -> Path:
    """The file of a checkpoint's curves, by the checkpoint's key."""
    return cache_folder / "calibration" / f"{key[:16]}.json"


def save_curves(path: Path, curves: Curves) -> None:
    """Writes curves, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(asdict(curves), indent=1))


def load_curves(path: Path) -> Curves | None:
    """The curves in a file, checked; None without a file. Raises GriffinError for a file of something else."""
    try:
        content = read_object(path)
        values: dict[str, Any] = {name: need(content, name, str) for name in ("key", "text_sha256", "dtype")}
        values |= {name: need(content, name, int) for name in ("prompt_tokens", "continue_tokens", "windows")}
        values |= {"shares": _numbers(content, "shares"), "others": need(content, "others", float)}
        curves = Curves(kl=tuple(_numbers({"kl": row}, "kl") for row in need(content, "kl", list)), **values)
        _check(curves)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise GriffinError(
            f"{path} is not a calibration ({reason(error)}); `griffin calibrate --force` writes a new one"
        ) from None
    return curves


def _check(curves: Curves) -> None:
    shares = curves.shares
    ascend = (
        len(shares) > 1 and shares[0] >= 0 and shares[-1] <= 1 and all(low < high for low, high in pairwise(shares))
    )
    if not ascend:
        raise ValueError("its shares do not ascend between 0 and 1")
    if curves.others not in shares:
        raise ValueError(f"{curves.others} is none of its shares")
    if not curves.kl or any(len(row) != len(shares) for row in curves.kl):
        raise ValueError(f"a layer does not have one value for each of its {len(shares)} shares")
    if any(abs(value) > MOST for row in curves.kl for value in row):
        raise ValueError(f"a divergence is beyond {MOST:g} nats, which none can be")
    if min(curves.prompt_tokens, curves.continue_tokens, curves.windows) < 1:
        raise ValueError("it was measured on no tokens")


def _numbers(content: dict[str, Any], key: str) -> tuple[float, ...]:
    return tuple(as_kind(value, float, f"a number of {key}") for value in need(content, key, list))
