"""Sharing the kept neurons over layers by what each layer's neurons are worth, as measured once per checkpoint.

The paper keeps the same share of every layer. Pruning one layer alone shows how much the output (its KL divergence
from the full model's) depends on that layer's neurons; along these curves the same total is shared better.
`evaluation/calibrate.py` measures them.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import CheckpointError, GriffinError
from .selection import kept_neurons
from .weights.checkpoint import Checkpoint

SAMPLES, SAMPLE_BYTES = 16, 4096  # of the weights, for a checkpoint's key


@dataclass(frozen=True)
class Curves:
    """What every layer's neurons are worth to one checkpoint.

    kl[i][j]: nats between the full model's output and that with only `shares[j]` of layer i's neurons, the experts
    chosen by the prompt and every other layer whole; mean over the continuation tokens of all windows.
    `shares` ascend from 0 to 1; the last column is 0. The rest says what was measured, and on which text."""

    key: str
    shares: tuple[float, ...]
    kl: tuple[tuple[float, ...], ...]
    text_sha256: str
    prompt_tokens: int
    continue_tokens: int
    windows: int
    dtype: str

    def at(self, layer: int, share: float) -> float:
        """The KL of one layer at any share, by the straight line between the two nearest that were measured."""
        points = zip(self.shares, self.kl[layer], strict=True)
        for (low, before), (high, after) in pairwise(points):
            if low <= share <= high:
                return before + (after - before) * (share - low) / (high - low)
        raise ValueError(f"share {share} is outside [0, 1]")


@dataclass(frozen=True)
class _Step:
    """One straight piece of a layer's curve: `neurons` more of them lower the KL by `fall` each."""

    layer: int
    neurons: int
    fall: float


def share_neurons(curves: Curves, neurons: Sequence[int], sparsity: float) -> tuple[int, ...]:
    """Kept neurons of each layer, k_i <= neurons[i]: as many in all as with the same share of every layer.

    Greedy on the lower convex hull of each curve, the steepest piece first; of equals the first layer. On the hull
    that is the best there is, if the layers' losses add up. The last piece is taken in part, so that the sum is exact.
    """
    if len(neurons) != len(curves.kl):
        raise CheckpointError(f"the calibration is of {len(curves.kl)} layers, the model has {len(neurons)}")
    left = sum(kept_neurons(count, sparsity) for count in neurons)
    steps = [step for i, count in enumerate(neurons) for step in _steps(i, curves.shares, curves.kl[i], count)]
    kept = [0] * len(neurons)
    for step in sorted(steps, key=lambda step: -step.fall):  # stable: of equals the first
        taken = min(step.neurons, left)
        kept[step.layer] += taken
        left -= taken
    return tuple(kept)


def _steps(layer: int, shares: Sequence[float], kl: Sequence[float], neurons: int) -> list[_Step]:
    """A layer's lower convex hull as pieces, from no neuron to all of them; their falls descend.

    A rise between two shares is noise: more neurons never count as worse, so the hull never rises either."""
    floor, points = math.inf, []
    for share, value in zip(shares, kl, strict=True):
        floor = min(floor, value)
        points.append((round(share * neurons), floor))
    steps, (kept, value) = [], points[0]
    while kept < neurons:
        later = [(count, (value - low) / (count - kept), low) for count, low in points if count > kept]
        count, fall, low = max(later, key=lambda point: (point[1], point[0]))
        steps.append(_Step(layer, count - kept, fall))
        kept, value = count, low
    return steps


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """SHA-256, as hex, of what tells checkpoints apart without reading them whole: config.json, every tensor's name,
    dtype, shape and place, and a sample of the weights (16 tensors, 4 KiB in the middle of each).

    It notices another size, format or precision, and any training that moved one of the sampled tensors there; it
    does not notice a change to the others alone. Moving or renaming the folder changes nothing."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    tensors = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    for info in tensors:
        place = (info.name, str(info.dtype), info.shape, info.file.name, info.begin, info.end)
        digest.update(repr(place).encode())
    for index in range(min(SAMPLES, len(tensors))):
        info = tensors[index * len(tensors) // min(SAMPLES, len(tensors))]
        with info.file.open("rb", buffering=0) as file:
            middle = info.begin + info.bytes // 2
            digest.update(os.pread(file.fileno(), min(SAMPLE_BYTES, info.end - middle), middle))
    return digest.hexdigest()


def calibration_path(cache_folder: Path, key: str) -> Path:
    """Where the curves of the checkpoint with this key are kept."""
    return cache_folder / "calibration" / f"{key[:16]}.json"


def save_curves(path: Path, curves: Curves) -> None:
    """Write the curves, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.new")
    temporary.write_text(json.dumps(asdict(curves), indent=1))
    temporary.replace(path)


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
        raise _not_curves(path, "its shares do not ascend from 0 to 1")
    if not curves.kl or any(len(row) != len(curves.shares) for row in curves.kl):
        raise _not_curves(path, f"a layer does not have one value for each of its {len(curves.shares)} shares")
    return curves


def _ascend(shares: Sequence[float]) -> bool:
    ends = len(shares) > 1 and shares[0] == 0 and shares[-1] == 1
    return ends and all(low < high for low, high in pairwise(shares))


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
