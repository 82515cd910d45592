"""Files written whole or not at all, free disk space, and what went wrong in words."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BudgetError, FetchError, GriffinError
from .foreign import NAME, sentence
from .workspace import remove, workspace

DISK_RESERVE = 64 * 2**20  # of a disk, left free
FIGURE = "Griffin Offload"  # in the metadata of our figures
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room
BESIDE_A_MODEL = (".jsonl", ".html", ".png", ".pdf", ".svg")  # outputs that nobody takes for a part of one
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def write_whole(path: Path, *, sync: bool = False, make_folder: bool = True, new: bool = False) -> Iterator[Path]:
    """Yields a path in a hidden folder beside `path`; what the block writes there becomes `path`, or is removed if the
    block fails.

    `sync`: put it on the disk before it becomes `path`. `new`: a `path` that is there by then is not replaced, but
    FileExistsError. Raises OSError with the name of `path`."""
    with about(path):
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with workspace(path.parent) as work:
            temporary = work / path.name
            yield temporary
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            put(temporary, path, new=new)


def write_text(path: Path, text: str, *, sync: bool = False, make_folder: bool = True) -> None:
    """Writes UTF-8 text, whole or not at all. Raises OSError, or ValueError for text that is not Unicode."""
    with write_whole(path, sync=sync, make_folder=make_folder) as temporary:
        temporary.write_text(text, "utf-8")


def put(temporary: Path, path: Path, *, new: bool) -> None:
    """Renames a file to `path`. `new`: raises FileExistsError where there is one already, also of this moment."""
    if not new:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        temporary.replace(path)


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Raises GriffinError where `out`, or a file beside it that belongs to it, is one of the files and folders that are
    read, holds one, or would be taken for a part of one. Links count as what they lead to."""
    ours = [path for path in (out, Path(f"{out}.state")) if os.path.exists(path)]
    place = Path(os.path.realpath(out))
    for each in inputs:
        real = Path(os.path.realpath(each))
        read = [real, *real.iterdir()] if real.is_dir() else [real]
        if any(os.path.samefile(path, file) for path in ours for file in read if file.exists()):
            what = "a folder" if out.is_dir() else "a file"
            raise GriffinError(f"{out} exists and is {what} of the input ({each}): give the output another name")
        if real.is_relative_to(place):
            raise GriffinError(f"{out} holds {each}, which is an input: give the output another name")
        if real.is_dir() and place.is_relative_to(real) and place.suffix.lower() not in BESIDE_A_MODEL:
            raise GriffinError(f"{out} would be in {each}, among the model's files: give the output another place")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """An OSError of this block names `path`, not a temporary file, unless it names another folder's."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if error.errno is None or (named and not Path(named).is_relative_to(path.parent)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_same(descriptor: int, path: Path) -> None:
    """Raises OSError where `path` is no longer the open file: somebody has removed or replaced it."""
    try:
        same = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        raise OSError(errno.ENOENT, "it was removed or replaced while it was written", str(path))


def make_once(folder: Path, build: Callable[[Path], Path], is_there: Callable[[Path], bool]) -> Path:
    """`folder`, made by one process only, whole or not at all: build(work) makes a folder in `work` and returns it.

    Raises BudgetError for a full disk, FetchError for other errors of the file system."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
            if not is_there(folder):  # else another process has just made it
                remove(folder)  # what a process left that was killed
                with workspace(folder.parent) as work:
                    build(work).rename(folder)
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
        told = sentence(error.strerror or error, NAME)
        return told[:1].lower() + told[1:]
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return f"it is not JSON ({error})" if isinstance(error, json.JSONDecodeError) else sentence(error, NAME)
