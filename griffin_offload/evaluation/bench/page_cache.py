"""Empties and fills the system's page cache."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...units import MIB

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK = 16 * MIB  # read at a time


def drop_caches() -> None:
    """Drop all cached file pages, so that the next run reads from the disk. Raises OSError."""
    os.sync()  # only clean pages can be dropped
    DROP_CACHES.write_text("3")


def drop_files(files: Iterable[Path]) -> None:
    """Drop these files from the page cache, and nothing else. Raises OSError."""
    if not hasattr(os, "posix_fadvise"):
        raise OSError("this system has no call for it")
    os.sync()
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(files: Iterable[Path], readers: int = 8) -> None:
    """Reads files once, so that they are in the page cache as far as it has room. Raises OSError."""
    blocks = [(file, begin) for file in files for begin in range(0, file.stat().st_size, BLOCK)]

    def read(block: tuple[Path, int]) -> None:
        with block[0].open("rb") as stream:
            os.pread(stream.fileno(), BLOCK, block[1])

    with ThreadPoolExecutor(readers) as pool:
        for _ in pool.map(read, blocks):
            pass
