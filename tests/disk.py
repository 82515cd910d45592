"""A disk that is full, and what is on it; and files that the page cache lacks."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from griffin_offload.checkpoint import page_cache
from griffin_offload.checkpoint.page_cache import is_cached


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_nothing(folder: Path, before: dict[str, bytes]) -> None:
    """No file and no folder of a failed export is there."""
    assert files(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted({name.partition("/")[0] for name in before})


def leaves_the_cache(path: Path, begin: int = 0, size: int = 0) -> None:
    """Drops a range of a file from the page cache; skips where the system does not do so, or does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this system does not tell what the page cache has")
    end = begin + size if size else path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        if not is_cached(fd, begin, end):
            pytest.skip("this file system does not tell what the page cache has")
        for _ in range(50):
            os.fsync(fd)  # only clean pages go, and not those that another core has in hand
            os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)
            if not any(page_cache._has(fd, begin, end) for _ in range(32)):
                return
            time.sleep(0.02)
        pytest.skip("this file system keeps what it was told to drop")
    finally:
        os.close(fd)
