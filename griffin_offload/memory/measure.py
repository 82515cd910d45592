"""Measures this process's memory and reading, and the disk's speed."""

import os
import platform
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from ..units import MIB
from ..workspace import workspace
from . import cuda

PROC = Path("/proc/self")
SECTOR = 512  # bytes in which Linux counts what a disk reads


def resident_set() -> int:
    """Bytes of RAM that this process has now."""
    return int(psutil.Process().memory_info().rss)


class PeakMeter:
    """Measures the peak of this process's RAM, or on CUDA of its context and torch's allocator, since it was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        if cuda.is_cuda(device):
            import torch

            cuda.context(device)  # before anything else uses the device, so that it can be measured
            cuda.give_back(device)  # or blocks of an earlier run would count
            torch.cuda.reset_peak_memory_stats(cuda.index(device))
        with suppress(OSError):  # Linux: reset the peak
            (PROC / "clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if cuda.is_cuda(self.device):
            return cuda.peak(self.device)
        if (kib := _proc("status", "VmHWM:")) is not None:
            return kib * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def processor_name() -> str:
    """The CPU's model, as far as the system says."""
    with suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def bytes_read() -> int | None:
    """Bytes that this process has read so far, from disk or page cache; None if unknown."""
    return _proc("io", "rchar:")


def disk_bytes() -> int | None:
    """Bytes that this thread has made a disk read so far, the system's read-ahead included; None if unknown."""
    if not hasattr(resource, "RUSAGE_THREAD"):
        return None
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock * SECTOR


def _proc(file: str, key: str) -> int | None:
    """A number that Linux has on this process, or None."""
    with suppress(OSError):
        for line in (PROC / file).read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    return None


def disk_bandwidth(folder: Path, sample: Path | None = None, size: int = 256 * MIB) -> float:
    """Bytes per second of sequential reading without the page cache, from `sample` or a temporary file in `folder`.

    Raises OSError."""
    if sample:
        return _read_speed(sample, size)
    with workspace(folder) as work, (work / "sample").open("wb") as file:
        block = os.urandom(MIB)
        for _ in range(size // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _read_speed(work / "sample", size)


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
