"""Which file it was: one that is read again must be the one whose header was read, or tensors of two would be mixed."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from ..errors import CheckpointError

OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe in a file's place: no waiting


@dataclass(frozen=True)
class Identity:
    """A file as it was: its inode, its size in bytes, and when it was last written to. Another name, or none any more,
    does not change it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Identity":
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


Files = Mapping[Path, Identity]


def identities(folder: Path) -> dict[Path, Identity]:
    """Of the plain files that lie in a folder itself, and of those that its links point to. Raises OSError."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):  # a link to nothing
            stat = path.stat()
            if S_ISREG(stat.st_mode):
                found[path] = Identity.of(stat)
    return found


def require_same(file: Path, stat: os.stat_result, files: Files) -> None:
    """Raises CheckpointError for a file that is not as `files` knows it; it need not know it."""
    if file in files and files[file] != Identity.of(stat):
        raise CheckpointError(f"{file} has changed since the model was opened: open it again")
