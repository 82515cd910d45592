"""Memory that is allocated once and cut into tensors, so that the process takes the bytes that were planned.

On the CPU an arena is one anonymous mapping. Pages are taken when they are first touched, huge ones if the system has
them, and go back to the system with the arena's last tensor (malloc would keep some).
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGN = 64  # a cache line, and enough for every dtype and vector width
PAGE = 4096  # of files and memory: direct reads begin and end at multiples of it in both
LARGE = 256 * 1024  # bytes; smaller tensors are not worth a direct read


def padded(count: int) -> int:
    """The most bytes that an arena takes for a tensor of `count` bytes, whatever its phase."""
    return -(-count // ALIGN) * ALIGN + (PAGE if count >= LARGE else 0)


class Arena:
    """`size` bytes on a device. `huge`: use huge pages; not for memory that fills slowly. `pinned`: host memory that a
    GPU copies by itself. `zeros`: all bytes are 0, as they are on the CPU anyway."""

    def __init__(
        self, size: int, device: str = "cpu", huge: bool = True, pinned: bool = False, zeros: bool = False
    ) -> None:
        self.size, self.used = size, 0
        if pinned:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        elif device == "cpu" and size:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if huge and hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self.memory = torch.frombuffer(mapping, dtype=torch.uint8)
        else:
            self.memory = (torch.zeros if zeros else torch.empty)(size, dtype=torch.uint8, device=device)

    def take(self, shape: Sequence[int], dtype: torch.dtype, phase: int | None = None) -> Tensor:
        """An uninitialised tensor. A large one begins `phase` bytes after the begin of a page, as in its file.

        Overflow is an error in the plan."""
        count, begin = math.prod(shape) * dtype.itemsize, self.used
        if phase is not None and count >= LARGE and phase % dtype.itemsize == 0:
            begin += (phase - begin) % PAGE
        self.used = -(-(begin + count) // ALIGN) * ALIGN
        assert self.used <= self.size, f"arena of {self.size} bytes asked for {self.used}"
        return self.memory[begin : begin + count].view(dtype).view(*shape)

    def rewind(self) -> None:
        """Makes all memory free again: the tensors in it must no longer be used."""
        self.used = 0


def arenas_on(devices: Sequence[str], sizes: Sequence[int], huge: bool = True) -> dict[str, Arena]:
    """For each device one arena for all that is there: thing i of sizes[i] bytes on devices[i]."""
    total = dict.fromkeys(devices, 0)
    for device, size in zip(devices, sizes, strict=True):
        total[device] += size
    return {device: Arena(size, device, huge) for device, size in total.items()}
