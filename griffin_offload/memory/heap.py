"""Settings of the C library's heap, so that freed memory goes back to the system."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..units import MIB

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)


def return_freed_memory() -> None:
    """Makes glibc return every large block to the system when it is freed. No effect on other C libraries.

    By default glibc keeps freed blocks of up to 32 MiB, so that its memory cannot be predicted."""
    _mallopt({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: MIB, M_TRIM_THRESHOLD: MIB})
    trim_heap()


def trim_heap() -> None:
    """Returns all freed memory to the system, also from the middle of the heap."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def steady_heap() -> Iterator[None]:
    """The heap keeps freed memory while the block runs, since fresh pages for every layer's activations cost time.

    It grows to the largest layer's need, and is returned to the system at the end."""
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
