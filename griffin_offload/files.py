"""Files written whole or not at all, free disk space, and what went wrong in words."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BudgetError, FetchError

DISK_RESERVE = 64 * 2**20  # of a disk, left free
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room


@contextmanager
def write_whole(path: Path, *, sync: bool = False, make_folder: bool = True) -> Iterator[Path]:
    """Yields a new path beside `path`; what the block writes there becomes `path`, or is removed if the block fails.

    `sync`: put it on the disk before it becomes `path`. Raises OSError."""
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = False, make_folder: bool = True) -> None:
    """Writes UTF-8 text, whole or not at all. Raises OSError, or ValueError for text that is not Unicode."""
    with write_whole(path, sync=sync, make_folder=make_folder) as temporary:
        temporary.write_text(text, "utf-8")


def make_once(folder: Path, build: Callable[[Path], Path], is_there: Callable[[Path], bool]) -> Path:
    """`folder`, made by one process only, whole or not at all: build(work) makes a folder in `work` and returns it.

    Raises BudgetError for a full disk, FetchError for other errors of the file system."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    work = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
            if not is_there(folder):  # else another process has just made it
                for leftover in (folder, work):  # of a process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                work.mkdir()
                try:
                    build(work).rename(folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            raise BudgetError(f"the disk became full while {folder} was made; nothing of it is left") from error
        raise FetchError(f"{folder} cannot be made ({error}); GRIFFIN_CACHE=FOLDER names another place") from error
    return folder


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all bytes at an offset of an open file. Raises OSError."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that a folder, which need not exist yet, is on. Raises OSError."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def reason(error: Exception) -> str:
    """Why a file could not be read or written, without its name: 'permission denied'."""
    if isinstance(error, OSError):
        told = error.strerror or str(error)
        return told[:1].lower() + told[1:]
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return f"it is not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
