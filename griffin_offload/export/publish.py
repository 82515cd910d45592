"""An export's file or folder, written beside its place and put there whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ExportError
from ..files import DISK_RESERVE, free_disk, reason
from ..units import format_bytes


@dataclass
class Output:
    """`path`: where to write. `backup`: where what was in its place went, once the export is in it."""

    path: Path
    backup: Path | None = None


def real_path(out: Path, kind: str) -> Path:
    """`out` without links and dots: a link cannot be replaced by a folder, nor `.` renamed. Raises ExportError."""
    try:
        if "\0" in str(out):
            raise ValueError
        return out.resolve()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link to itself, before Python 3.13
        raise ExportError(f"{str(out)!r} cannot be written: it is no name of a {kind}") from None


@contextmanager
def new_output(out: Path, needed: int, is_export: Callable[[Path], bool], *, folder: bool) -> Iterator[Output]:
    """A temporary folder (or file) beside `out`, which takes its place at the end and is removed on failure.

    An earlier export there, as `is_export` tells, is replaced; anything else is kept as a backup. Raises ExportError if
    `out` cannot be written, or its disk has less than `needed` bytes free."""
    make = _make_folder if folder else _make_file
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := free_disk(out.parent)) < needed + DISK_RESERVE:
            raise ExportError(
                f"{out.parent} has {format_bytes(free)} free; the export needs {format_bytes(needed + DISK_RESERVE)}"
            )
        output = Output(make(out.parent, f".{out.name}."))
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {reason(error)}") from None
    try:
        output.path.chmod(0o755 if folder else 0o644)
        yield output
        output.backup = _publish(output.path, out, is_export, make)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {reason(error)}; nothing was left behind") from None
    finally:
        _remove(output.path)


def _publish(
    path: Path, out: Path, is_export: Callable[[Path], bool], make: Callable[[Path, str], Path]
) -> Path | None:
    """Renames the finished export; returns the backup of what was there, if it was no export."""
    nothing_there = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if nothing_there or (out.is_file() and is_export(out)):
        path.replace(out)
        return None
    backup, moved = make(out.parent, f"{out.name}.backup-"), False
    try:
        out.replace(backup)
        moved = True
        path.replace(out)
    except BaseException:
        if not moved:
            _remove(backup)
        elif not out.exists():
            backup.replace(out)
        raise
    if not is_export(backup):
        return backup
    _remove(backup)
    return None


def _make_folder(parent: Path, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _make_file(parent: Path, prefix: str) -> Path:
    number, name = tempfile.mkstemp(prefix=prefix, dir=parent)
    os.close(number)
    return Path(name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
