"""What memory there is, what of it was used, and how fast it and the disk are: measured, never assumed."""

import ctypes
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from .errors import OptionError
from .units import MIB

MARGIN = 0.05  # of what is free: left to the rest of the machine
PROC = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)


def resident_set() -> int:
    """Bytes of RAM that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def return_freed_memory() -> None:
    """Have the C library give every large block back to the system when it is freed (glibc; nothing elsewhere).

    By itself it keeps freed blocks of up to 32 MiB, wherever they lie: what it holds then cannot be foreseen."""
    _mallopt({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: MIB, M_TRIM_THRESHOLD: MIB})
    trim_heap()


def trim_heap() -> None:
    """Give back what was freed until now, wherever it lies: large blocks too may have filled holes of the heap."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def steady_heap() -> Iterator[None]:
    """While activations come and go, layer after layer, the heap keeps what it has: fresh pages cost time.

    The largest layer sets its size; afterwards it goes back to the system."""
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})
    try:
        yield
    finally:
        return_freed_memory()


def _mallopt(settings: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in settings.items():
            library.mallopt(parameter, value)


class PeakMeter:
    """The peak of a device's memory since it was made: of this process's RAM, or of the GPU's allocator."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # Linux: forget the peak of what ran before
            (PROC / "clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_reserved())
        with suppress(OSError):
            for line in (PROC / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def bytes_read() -> int | None:
    """Bytes that this process has asked the system to read so far (pages of the cache included); None if unknown."""
    with suppress(OSError):
        for line in (PROC / "io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    return None


def best_device() -> str:
    """cuda, mps or cpu: the best there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> str:
    """Raises OptionError for a device that is unknown or not there."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device):
        have = ", ".join(name for name, is_there in there.items() if is_there)
        raise OptionError(f"there is no device {device!r} here; there is: {have}")
    return device


def container_limit() -> int | None:
    """The smallest memory limit of the control groups that this process is in, bytes; None if there is none."""
    return min((limit for limit, _ in _groups()), default=None)


def available_memory() -> int:
    """RAM that a process here can still take, bytes: the machine's, or what is left of a container's limit."""
    left = [max(0, limit - used) for limit, used in _groups()]
    return min([int(psutil.virtual_memory().available), *left])


def device_budget(device: str) -> int:
    """The default for --device-memory: what is free, less a margin. On the CPU it counts the whole process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0] * (1 - MARGIN))
    return resident_set() + int(available_memory() * (1 - MARGIN))


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, used without the page cache) of each control group up to the root; version 1 and 2."""
    with suppress(OSError):
        for line in (PROC / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                yield from _limits(
                    CGROUP / "memory",
                    path,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    ("total_inactive_file", "total_active_file"),
                )
            elif controllers == "":
                yield from _limits(CGROUP, path, "memory.max", "memory.current", ("inactive_file", "active_file"))


def _limits(root: Path, path: str, limit: str, usage: str, cache: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    group = root / path.lstrip("/")
    for place in (group, *group.parents):
        with suppress(OSError, ValueError):
            bound = int((place / limit).read_text())  # "max" is no limit
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            if bound < psutil.virtual_memory().total:
                yield bound, int((place / usage).read_text()) - sum(int(stat.get(key, 0)) for key in cache)
        if place == root:
            return


def read_by_a_token(model: Any) -> list[Any]:
    """The weights of a transformers model that decoding one token reads: all but an embedding table that is not the
    head too."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return [p.data for p in model.parameters() if p is head or p is not table]


def memory_bandwidth(weights: Iterable[Any], passes: int = 5, seconds: float = 0.3) -> float:
    """Bytes a second at which one token passes through these matrices (torch tensors), products and nothing else.

    The limit of decoding on this machine, measured on the very weights: the best pass of a few. Codes of packed weights
    are read as if they were bfloat16: as fast as memory goes, whatever they mean."""
    import torch

    from .gemv import own_kernels

    matrices = [w if w.is_floating_point() else _as_bfloat16(w) for w in weights if w.dim() == 2 and w.numel()]
    inputs = {w.shape[1]: torch.ones(1, w.shape[1], dtype=w.dtype, device=w.device) for w in matrices}
    total = sum(w.numel() * w.element_size() for w in matrices)
    best, end = float("inf"), time.perf_counter() + seconds
    for number in range(passes if matrices else 0):
        if number and time.perf_counter() > end:
            break
        start = time.perf_counter()
        with own_kernels():
            for w in matrices:
                torch.nn.functional.linear(inputs[w.shape[1]], w)
        if matrices[0].is_cuda:
            torch.cuda.synchronize()  # waits for the products
        best = min(best, time.perf_counter() - start)
    return float(total / best)


def memory_bandwidth_here(device: str, size: int = 256 * MIB) -> float:
    """Bytes a second at which this machine reads weights, of a matrix made for it, bfloat16."""
    import torch

    return memory_bandwidth([torch.ones(size // 4096, 2048, dtype=torch.bfloat16, device=device)])


def _as_bfloat16(codes: Any, columns: int = 1024) -> Any:
    """The whole rows of `columns` numbers that there are in these bytes."""
    import torch

    flat = codes.view(-1).view(torch.uint8)
    return flat[: flat.numel() // (2 * columns) * 2 * columns].view(torch.bfloat16).view(-1, columns)


def disk_bandwidth(folder: Path, sample: Path | None = None, size: int = 256 * MIB) -> float:
    """Bytes a second of sequential reading, not from the page cache: of `sample`, or of a file made in `folder`.

    Raises OSError where neither can be read."""
    if sample:
        return _read_speed(sample, size)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="griffin-") as file:
        block = os.urandom(MIB)
        for _ in range(size // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _read_speed(Path(file.name), size)


def _read_speed(path: Path, size: int) -> float:
    fd = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # clean pages leave the cache
        buffer = bytearray(8 * MIB)
        done, start = 0, time.perf_counter()
        while done < size and (count := os.preadv(fd, [buffer], done)):
            done += count
        return done / (time.perf_counter() - start)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """This machine; bytes, and bytes a second."""

    ram_total: int
    ram_available: int
    container_limit: int | None
    gpus: tuple[Gpu, ...]
    disk_free: int
    disk_read_bandwidth: float | None
    device: str
    budget: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def machine(folder: Path, sample: Path | None = None) -> Machine:
    """Measure this machine; `folder` is where models are kept, `sample` a large file there to read."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    speed = None
    with suppress(OSError):  # a full or read-only disk has no speed to tell
        folder.mkdir(parents=True, exist_ok=True)
        speed = disk_bandwidth(folder, sample)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    device = best_device()
    return Machine(
        ram_total=int(psutil.virtual_memory().total),
        ram_available=available_memory(),
        container_limit=container_limit(),
        gpus=tuple(gpus),
        disk_free=int(psutil.disk_usage(str(place)).free),
        disk_read_bandwidth=speed,
        device=device,
        budget=device_budget(device),
    )
