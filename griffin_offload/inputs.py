"""Reads files that a user or a checkpoint names: never more than a limit, and never waiting for one that has no end."""

import errno
import os
import stat
from pathlib import Path

from .units import MIB, format_bytes

SETTINGS = 16 * MIB  # JSON or TOML of a model, a run, a user
PROMPT = 32 * MIB  # more than any model reads
TEXT = 64 * MIB  # what prompts and samples are cut from
ROWS = 256 * MIB  # JSONL
VOCABULARY = 256 * MIB
PIECE = MIB
PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def read_input(path: Path | str, limit: int = SETTINGS, *, pipe: bool = False) -> bytes:
    """All bytes of a plain file, or of the null device. `pipe`: of /dev/stdin and of <(a command) too.

    Raises OSError for anything else, such as a folder, a named pipe or a device, and for more than `limit` bytes;
    ValueError for a name with a NUL."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        mode = os.fstat(descriptor)
        if stat.S_ISDIR(mode.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode.st_mode) and not _is_null(mode):
            if not pipe or not _is_open_pipe(path, descriptor):
                raise OSError(errno.EINVAL, _why_not(mode.st_mode, pipe), str(path))
            os.set_blocking(descriptor, True)
        return read_open(descriptor, limit, str(path))
    finally:
        os.close(descriptor)


def require_plain(path: Path, limit: int | None = None) -> None:
    """For before another library reads a file. Raises OSError where `read_input` would; not for one that is not
    there."""
    try:
        mode = path.stat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode.st_mode):
        raise OSError(errno.EINVAL, _why_not(mode.st_mode, pipe=False), str(path))
    if limit is not None and mode.st_size > limit:
        raise _too_large(limit, str(path))


def read_open(descriptor: int, limit: int, name: str) -> bytes:
    """All bytes that come from an open file. Raises OSError for more than `limit`."""
    if os.fstat(descriptor).st_size > limit:
        raise _too_large(limit, name)
    found = bytearray()
    while piece := os.read(descriptor, PIECE):
        found += piece
        if len(found) > limit:
            raise _too_large(limit, name)
    return bytes(found)


def _too_large(limit: int, name: str) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {format_bytes(limit)}, the most that is read here", name)


def _why_not(mode: int, pipe: bool) -> str:
    if stat.S_ISFIFO(mode):
        return "it is a named pipe; give a file, or pipe the text in" if pipe else "it is a pipe; give a plain file"
    return "it is a device; give a plain file" if not stat.S_ISSOCK(mode) else "it is a socket; give a plain file"


def _is_open_pipe(path: Path | str, descriptor: int) -> bool:
    """Whether a path names a pipe or a terminal that this process was given, and that somebody writes to."""
    return str(path).startswith(PIPES) and (stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor))


def _is_null(mode: os.stat_result) -> bool:
    try:
        return stat.S_ISCHR(mode.st_mode) and mode.st_rdev == os.stat(os.devnull).st_rdev
    except OSError:
        return False
