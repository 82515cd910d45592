"""Whether the page cache has a file's bytes. The system is asked for single ones, at random places, without a wait.

A miss may make the system read that page, so that fixed places would be found there the next time."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

SAMPLES = 4  # of one read
OVERALL = 128  # of a checkpoint
MOSTLY = 0.99  # of the samples: what is missing comes from the disk for every prompt


def is_cached(fd: int, begin: int, end: int) -> bool:
    """Whether bytes [begin, end) of a file seem to be in the page cache. False where the system does not tell."""
    return all(_has(fd, begin, end) for _ in range(SAMPLES))


def mostly_cached(files: Iterable[Path]) -> bool:
    """Whether the page cache has these files, but for a hundredth at most.

    False where the system does not tell, or a file is not there."""
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    total = sum(sizes.values())
    room = OVERALL * (1 - MOSTLY)
    for file, size in sizes.items():
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # a miss reads one page, and none ahead
            for _ in range(-(-OVERALL * size // total)):
                room -= not _has(fd, 0, size)
                if room < 0:
                    return False
        finally:
            os.close(fd)
    return total > 0


def _has(fd: int, begin: int, end: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT") or end <= begin:
        return False
    try:
        return os.preadv(fd, [bytearray(1)], random.randrange(begin, end), os.RWF_NOWAIT) == 1
    except OSError:  # EAGAIN: not there; EOPNOTSUPP: the file system cannot say
        return False
