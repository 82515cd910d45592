"""How fast this device multiplies one token by weights of each format: measured once, kept in the cache folder.

A speed is in bytes of the format itself a second, so that a token takes the sum of (bytes in a format / its speed)."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..memory.arena import Arena
from ..memory.measured import DAY, add_entry, machine_key, read_entry
from ..native.library import chosen
from ..paths import cache_folder
from ..quant.formats import FORMATS, allocate_weight
from ..quant.weight import Stored
from ..small_json import need
from ..units import MIB
from .bandwidth import wait_for
from .decode_kernels import own_kernels

SECONDS, MOST = 0.15, 0.6  # for each format; on a machine so busy that the best time is not seen three times
DISTURBED = 1.25  # times as many tokens a second as expected
FILLING = 0x3C  # any byte will do: as a number of every dtype it is finite, and not so small that products are slow
SLOWEST, FASTEST = 1e3, 1e18  # bytes a second that can be true
SHAPE, SIZE = (4096, 4096), 128 * MIB  # of a matrix, and of all in a format: more than the device's caches hold
GPU_SHAPE, GPU_SIZE = (13824, 5120), 512 * MIB
LONG = 8192  # rows and columns of a product that keeps a GPU busy while others are launched
SMALL = 512 * MIB  # bytes of weights: four times what measuring the speed of each format takes on a CPU


@dataclass(frozen=True)
class Speeds:
    """Bytes a second by format, a name of FORMATS."""

    by_format: tuple[tuple[str, float], ...]

    def seconds(self, read: Mapping[str, int]) -> float:
        """Seconds of one token that reads so many bytes in each format."""
        speeds = dict(self.by_format)
        return sum(count / speeds[format] for format, count in read.items())

    @property
    def dense(self) -> float:
        """Of the model's own dtype: the bandwidth of the memory."""
        return dict(self.by_format)[""]

    def best(self, other: "Speeds | None") -> "Speeds":
        """The higher of both speeds in each format: a busy machine measures too little, none measures too much."""
        others = dict(other.by_format) if other else {}
        return Speeds(tuple((format, max(speed, others.get(format, 0.0))) for format, speed in self.by_format))


@lru_cache(maxsize=8)
def measured_speeds(device: str, dtype: torch.dtype) -> Speeds:
    """The speeds on this device, measured if the cache has none of today; the best that was seen counts.

    Takes half a second, on a busy machine up to two, and 128 MiB of RAM (on a GPU 768 MiB of its memory)."""
    path, key = _path(), speeds_key(device, dtype)
    age, known = _load(path, key)
    if known and 0 <= age < DAY:
        return known
    speeds = measure_speeds(device, dtype).best(known)
    _save(path, key, speeds)
    return speeds


def speeds_of(weights: int, device: str, dtype: torch.dtype, measure: bool) -> Speeds | None:
    """How fast a device multiplies each format, measured if need be, or else as the cache knows it.

    None for few bytes of `weights`, which the measurement would outweigh, and for a GPU without room."""
    if weights < SMALL:
        return None
    with suppress(torch.OutOfMemoryError):
        return (measured_speeds if measure else known_speeds)(device, dtype)
    return None


def known_speeds(device: str, dtype: torch.dtype) -> Speeds | None:
    """The speeds on this device as they were measured last, or None. Measures nothing."""
    return _load(_path(), speeds_key(device, dtype))[1]


def doubt_speeds(device: str, dtype: torch.dtype, expected: float, seen: float) -> None:
    """After a run that made more tokens a second than expected: what was measured was disturbed, so the next run that
    asks measures again."""
    path, key = _path(), speeds_key(device, dtype)
    known = _load(path, key)[1]
    if known and seen > DISTURBED * expected:
        add_entry(path, key, bytes_per_s=dict(known.by_format), time=0.0)
        measured_speeds.cache_clear()


def measure_speeds(device: str, dtype: torch.dtype, size: int | None = None) -> Speeds:
    """Measures now. `size`: bytes of the matrices in each format, instead of the usual ones."""
    shape, usual = (SHAPE, SIZE) if device == "cpu" else (GPU_SHAPE, GPU_SIZE)
    size, speeds = size or usual, []
    for format in FORMATS:
        each = int(FORMATS[format].bytes(*shape, dtype.itemsize))
        count = -(-size // each)
        weights = _weights(format, device, dtype, shape, count)
        speeds.append((format, each / _seconds_of_one(weights, device, dtype, shape[1])))
        del weights  # before the next are allocated
    return Speeds(tuple(speeds))


def _weights(format: str, device: str, dtype: torch.dtype, shape: tuple[int, int], count: int) -> Sequence[Stored]:
    """Matrices of different memory, full of one byte: what they hold does not matter to their speed."""
    arena = Arena(count * int(FORMATS[format].bytes(*shape, dtype.itemsize)), device)
    arena.memory.fill_(FILLING)  # memory that was never written is one page of zeros
    return [allocate_weight(format, arena, *shape, dtype) for _ in range(count)]


def _seconds_of_one(weights: Sequence[Stored], device: str, dtype: torch.dtype, columns: int) -> float:
    """Seconds of the product with one matrix, at best."""
    x = torch.ones(1, 1, columns, dtype=dtype, device=device)
    with torch.no_grad(), own_kernels() if device == "cpu" else nullcontext():
        weights[0].linear(x)  # the first loads, and may compile
        if device == "cuda":
            return _on_cuda(weights, x)
        times: list[float] = []
        begin = time.perf_counter()
        while not _enough(sorted(times), time.perf_counter() - begin):
            start = time.perf_counter()
            weights[len(times) % len(weights)].linear(x)
            wait_for(device)
            times.append(time.perf_counter() - start)
    return min(times)


def _enough(times: Sequence[float], seconds: float) -> bool:
    """Whether to stop after these times, ascending, which took so many seconds: the best was no accident."""
    return len(times) >= 3 and seconds >= SECONDS and (times[2] < 1.1 * times[0] or seconds >= MOST)


def _on_cuda(weights: Sequence[Stored], x: torch.Tensor) -> float:
    """The same by the device's own clock. A long product goes first: while it runs, all the others are launched."""
    long = torch.ones(LONG, LONG, dtype=x.dtype, device=x.device)
    out, best = torch.empty_like(long), math.inf
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.mm(long, long, out=out)
        begin.record()
        for weight in weights:
            weight.linear(x)
        end.record()
        end.synchronize()  # waits for the products
        best = min(best, begin.elapsed_time(end) / 1000 / len(weights))
    return best


def _path() -> Path:
    return cache_folder() / "speeds.json"


def speeds_key(device: str, dtype: torch.dtype) -> str:
    """What speeds depend on: the machine, and our own kernels."""
    return machine_key(device, dtype) + (f", {chosen() or 'no'} kernels" if device == "cpu" else "")


def _load(path: Path, key: str) -> tuple[float, Speeds | None]:
    """Age in seconds, and speeds; None where the file has none, or none that can be true."""
    age, entry = read_entry(path, key)
    with suppress(ValueError):
        speeds = Speeds(tuple((format, need(need(entry, "bytes_per_s", dict), format, float)) for format in FORMATS))
        if all(SLOWEST < speed < FASTEST for _, speed in speeds.by_format):
            return age, speeds
    return 0.0, None


def _save(path: Path, key: str, speeds: Speeds) -> None:
    add_entry(path, key, bytes_per_s=dict(speeds.by_format))
