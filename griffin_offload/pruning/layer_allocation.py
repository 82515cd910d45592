"""Sharing the kept neurons over layers by what each layer's neurons are worth, as measured once per checkpoint.

The paper keeps the same share of every layer. Where half of all neurons are gone, giving one layer more, or taking some
away, shows how much the output (its KL divergence from the full model's) depends on that layer's neurons.
`evaluation/calibrate.py` measures it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, GriffinError
from ..files import write_text
from .selection import kept_neurons

RATE = 5.0  # a layer's loss falls as exp(-RATE share): 3 to 8 do about as well on two models (docs/results.md)
LEAST = 0.05  # no layer's neurons count for less, against the average layer's


@dataclass(frozen=True)
class Curves:
    """What every layer's neurons are worth to one checkpoint.

    kl[i][j]: nats between the full model's output and that of a model which keeps `shares[j]` of layer i's neurons and
    `others` of every other layer's, chosen by the prompt; mean over the continuation tokens of all windows.
    `shares` ascend in [0, 1], and `others` is one of them. The rest says what was measured, and on which text."""

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
        """How much a layer's neurons matter, the average layer's being about 1.

        A share of one layer alone raises the KL or lowers it, against `others` of that layer too; the weight is the
        factor on the average layer's changes that fits a layer's own, by least squares. One number for each layer is
        what a short text can tell: sharing by the single points, which are noisy, did worse."""
        common = self.shares.index(self.others)
        changes = [[value - row[common] for value in row] for row in self.kl]
        average = [sum(column) / len(changes) for column in zip(*changes, strict=True)]
        square = sum(change**2 for change in average)
        if not square:
            return (1.0,) * len(changes)
        fits = (sum(ours * mean for ours, mean in zip(row, average, strict=True)) / square for row in changes)
        return tuple(max(fit, LEAST) for fit in fits)


def share_neurons(curves: Curves, neurons: Sequence[int], sparsity: float) -> tuple[int, ...]:
    """Kept neurons of each layer, k_i <= neurons[i]: as many in all as with the same share of every layer.

    Where layer i of F_i neurons and weight a_i loses a_i exp(-RATE k_i / F_i), and losses add up, the least loss for a
    total has k_i = F_i (c + ln(a_i) / RATE) within [0, F_i], with one c for all layers (F_i: the loss is per neuron,
    and equal layers get equal shares)."""
    if len(neurons) != len(curves.kl):
        raise CheckpointError(f"the calibration is of {len(curves.kl)} layers, the model has {len(neurons)}")
    total = sum(kept_neurons(count, sparsity) for count in neurons)
    ahead = [math.log(weight) / RATE for weight in curves.weights]

    def wanted(level: float) -> list[float]:
        return [count * min(1.0, max(0.0, level + more)) for count, more in zip(neurons, ahead, strict=True)]

    low, high = -max(ahead), 1 - min(ahead)  # nothing, and everything
    for _ in range(60):  # the highest level whose whole neurons are no more than the total
        middle = (low + high) / 2
        if sum(map(int, wanted(middle))) <= total:
            low = middle
        else:
            high = middle
    shares = wanted(high)  # just above: here those that it takes one more of have come to a whole number
    kept = [int(share) for share in wanted(low)]
    for layer in sorted(range(len(kept)), key=lambda i: kept[i] - shares[i])[: total - sum(kept)]:
        kept[layer] += 1
    return tuple(kept)


def calibration_path(cache_folder: Path, key: str) -> Path:
    """Where the curves of the checkpoint with this key are kept."""
    return cache_folder / "calibration" / f"{key[:16]}.json"


def save_curves(path: Path, curves: Curves) -> None:
    """Writes curves, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(asdict(curves), indent=1))


def load_curves(path: Path) -> Curves | None:
    """The curves in a file, checked; None where there is no file. Raises GriffinError for what is not curves."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _not_curves(path, str(error)) from None
    try:
        curves = Curves(
            key=_text(content["key"]),
            shares=_numbers(content["shares"]),
            others=_numbers([content["others"]])[0],
            kl=tuple(_numbers(row) for row in content["kl"]),
            text_sha256=_text(content["text_sha256"]),
            prompt_tokens=_count(content["prompt_tokens"]),
            continue_tokens=_count(content["continue_tokens"]),
            windows=_count(content["windows"]),
            dtype=_text(content["dtype"]),
        )
    except KeyError as error:
        raise _not_curves(path, f"{error} is missing") from None
    except (TypeError, ValueError) as error:
        raise _not_curves(path, str(error)) from None
    if not _ascend(curves.shares):
        raise _not_curves(path, "its shares do not ascend between 0 and 1")
    if curves.others not in curves.shares:
        raise _not_curves(path, f"{curves.others} is none of its shares")
    if not curves.kl or any(len(row) != len(curves.shares) for row in curves.kl):
        raise _not_curves(path, f"a layer does not have one value for each of its {len(curves.shares)} shares")
    return curves


def _ascend(shares: Sequence[float]) -> bool:
    inside = len(shares) > 1 and shares[0] >= 0 and shares[-1] <= 1
    return inside and all(low < high for low, high in pairwise(shares))


def _not_curves(path: Path, reason: str) -> GriffinError:
    return GriffinError(f"{path} is not a calibration ({reason}); `griffin calibrate --force` writes a new one")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise TypeError(f"{value!r} is not a count")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise TypeError("a row is not a list of finite numbers")
    return tuple(float(v) for v in values)
