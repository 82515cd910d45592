"""Memory that is asked for once and carved into tensors, so that the plan's bytes are the process's bytes.

On the CPU an arena is one anonymous mapping: its pages are taken as they are first touched, in huge pages where the
system has them, and go back to the system the moment the last tensor in it is gone (malloc would keep some).
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGN = 64  # a cache line, and enough for every dtype and vector width
PAGE = 4096  # of files and memory: direct reads begin and end at multiples of it in both
LARGE = 256 * 1024  # bytes: smaller tensors are not worth a direct read


def padded(count: int) -> int:
    """Bytes that an arena takes at most for a tensor of `count` bytes: a large one may be set to any phase."""
    return -(-count // ALIGN) * ALIGN + (PAGE if count >= LARGE else 0)


class Arena:
    """`size` bytes on a device. Not `huge`: pages of the usual size, for memory that fills slowly. `pinned`: of the
    host, for a GPU's copies."""

    def __init__(self, size: int, device: str = "cpu", huge: bool = True, pinned: bool = False) -> None:
        self.size, self.used = size, 0
        if pinned:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        elif device == "cpu" and size:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if huge and hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self.memory = torch.frombuffer(mapping, dtype=torch.uint8)
        else:
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)

    def take(self, shape: Sequence[int], dtype: torch.dtype, phase: int | None = None) -> Tensor:
        """An uninitialised tensor; a large one on the CPU at `phase` bytes behind a page's begin, as in its file.

        An arena that overflows is a fault of the plan, not of the user."""
        count, begin = math.prod(shape) * dtype.itemsize, self.used
        if phase is not None and count >= LARGE and phase % dtype.itemsize == 0:
            begin += (phase - begin) % PAGE
        self.used = -(-(begin + count) // ALIGN) * ALIGN
        assert self.used <= self.size, f"arena of {self.size} bytes asked for {self.used}"
        return self.memory[begin : begin + count].view(dtype).view(*shape)

    def rewind(self) -> None:
        """Give all of it out again. The tensors taken before must no longer be used."""
        self.used = 0
