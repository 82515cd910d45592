"""Settings of the C library's heap, so that freed memory goes back to the system."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..units import MIB

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)


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
