"""A device without room becomes one BudgetError: before a run if that can be known, or else when it happens."""

import errno
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..errors import BudgetError, one_line
from ..units import MIB, format_bytes
from . import cuda
from .machine import available_memory

# What torch says where its error has no type of its own: for the CPU, pinned memory, cuBLAS and MPS.
WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
SPARE = 64 * MIB  # below what is free, for a budget that we suggest


@contextmanager
def planned(
    device: str, peak: int = 0, unload: Callable[[], None] = lambda: None, cards: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Runs the block, which was planned to take `peak` bytes of the device at most (0: not planned), or of several
    devices, of which it is the sum, what `cards` says.

    Raises BudgetError before the block if a CUDA device has no such room, and where the block runs out of memory; the
    weights are unloaded then, by `unload`."""
    try:
        for each, needed in (cards or {device: peak}).items():
            _check_room(each, needed)
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # whose tensors would stay as long as the error
        unload()
        told = f"{format_bytes(peak)} were planned, " if peak else ""
        raise BudgetError(
            f"{device} is out of memory: {told}{_left(device)} is free now. Give a smaller --device-memory, or fewer "
            f"tokens ({one_line(error)})"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or of the system says that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def _left(device: str) -> str:
    """Bytes that are free on a device which has just run out of them, after torch's blocks are given back."""
    try:
        cuda.give_back(device)
        return format_bytes(cuda.free(device) if cuda.is_cuda(device) else available_memory())
    except RuntimeError:  # a card that has no room for a context cannot even be asked
        return "nothing"


def _check_room(device: str, peak: int) -> None:
    """Raises BudgetError if `peak` bytes, of which this process may hold some already, are more than CUDA has now."""
    if cuda.is_cuda(device) and peak > (room := cuda.held(device) + cuda.free(device)):
        others, most = cuda.others(device), max(0, room - SPARE) // MIB
        raise BudgetError(
            f"{format_bytes(peak)} are planned on {device}, where other processes hold {format_bytes(others)} and "
            f"{format_bytes(room)} are left. Give --device-memory {most}MiB"
        )
