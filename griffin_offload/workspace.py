"""A hidden folder for what is not finished yet, which no process outlives for long.

It is called `.griffin-XXXXXXXX.tmp`. A file in it is locked for as long as its process lives; the next process that
makes such a folder beside it removes those whose lock is free, which a killed process left."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no folder is ever taken for a dead process's
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"\.griffin-[0-9a-f]{8}\.tmp")
LOCK = ".griffin-lock"


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Yields a new hidden folder in `folder`, which exists; it is removed with what is in it. Raises OSError."""
    sweep(folder)
    work, lock = _make(folder)
    try:
        yield work
    finally:
        try:
            os.close(lock)  # first: removing takes an open file, of which there may be no other
            remove(work)
        except BaseException:  # a signal came meanwhile
            remove(work)
            raise


def sweep(folder: Path) -> None:
    """Removes the workspaces in a folder whose processes have ended. What cannot be removed stays."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if NAME.fullmatch(name):
                _sweep(folder / name)


def remove(folder: Path) -> None:
    """Removes a folder and what is in it, following no links. What cannot be removed stays, and the lock with it.

    shutil.rmtree would need two open files for each level."""
    with suppress(OSError):
        for name in sorted(os.listdir(folder), key=lambda name: name == LOCK):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                remove(path)
            elif name != LOCK or os.listdir(folder) == [LOCK]:
                with suppress(OSError):
                    path.unlink()
        folder.rmdir()


def _make(folder: Path) -> tuple[Path, int]:
    """The new folder, and the locked descriptor."""
    while True:
        work = folder / f".griffin-{os.urandom(4).hex()}.tmp"
        with suppress(FileExistsError):
            work.mkdir(0o700)
            try:
                lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:  # swept, as it had no lock yet
                continue
            except BaseException:
                remove(work)
                raise
            if _locked(lock) is not False and (work / LOCK).exists():
                return work, lock
            os.close(lock)  # swept, as the lock was free yet


def _sweep(work: Path) -> None:
    if fcntl is None or work.is_symlink():
        return
    try:
        lock = os.open(work / LOCK, os.O_RDWR)
    except FileNotFoundError:
        with suppress(OSError):
            work.rmdir()  # its process was killed before there was a lock; it is empty
        return
    except OSError:  # another user's
        return
    try:
        if _locked(lock):
            remove(work)
    finally:
        os.close(lock)


def _locked(lock: int) -> bool | None:
    """Locks a file. False: another process has it; None: the file system knows no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
    return True
