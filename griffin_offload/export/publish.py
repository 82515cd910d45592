"""Writes an export's file or folder beside its place, and puts it there whole, or not at all."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..errors import ExportError
from ..files import DISK_RESERVE, free_disk, put, reason
from ..units import MIB, format_bytes
from ..workspace import workspace

FACTS = "griffin.json"


class AlreadyThere(ExportError):
    """The export is there, whole, and was written with the same settings."""


@dataclass
class Output:
    """`path`: where to write. `backup`: where the export's place had something else, its new path."""

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


def require_new(out: Path, same: bool) -> None:
    """Raises ExportError for what is there; AlreadyThere where it is the `same` export."""
    if same:
        raise AlreadyThere(f"{out} is there already, written with the same settings; --force writes it again")
    exists = "exists and is not empty: give another folder" if out.is_dir() else "exists: give another name"
    raise ExportError(f"{out} {exists}, or --force to replace it")


def read_facts(folder: Path) -> dict[str, Any]:
    """What griffin.json says of an export; {} where there is none that can be read."""
    path = folder / FACTS
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size < 1024 * MIB:
            facts = json.loads(path.read_bytes())
            return facts if isinstance(facts, dict) else {}
    return {}


def is_export(folder: Path, whole: bool = False) -> bool:
    """Whether a folder has the files of an export of ours and nothing else. `whole`: and as long as written."""
    sizes = read_facts(folder).get("files")
    if not isinstance(sizes, dict):
        return False
    there = {entry.name: entry for entry in os.scandir(folder)}
    if there.keys() != {*sizes, FACTS} or not all(e.is_file(follow_symlinks=False) for e in there.values()):
        return False
    return not whole or all(there[name].stat().st_size == size for name, size in sizes.items())


@contextmanager
def new_output(out: Path, needed: int, ours: Callable[[Path], bool], force: bool) -> Iterator[Output]:
    """A path in a hidden folder beside `out`. What the block writes there becomes `out`, or is removed if it fails.

    With `force`, something in that place is replaced if it is one of `ours`, else kept as a backup. Raises ExportError
    if `out` cannot be written, is there by the end without `force`, or the disk has less than `needed` bytes free."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := free_disk(out.parent)) < (needed := needed + DISK_RESERVE):
            raise ExportError(f"{out.parent} has {format_bytes(free)} free; the export needs {format_bytes(needed)}")
        with workspace(out.parent) as work:
            output = Output(work / out.name)
            yield output
            output.path.chmod(0o755 if output.path.is_dir() else 0o644)
            output.backup = _publish(output.path, out, ours, force)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {reason(error)}; nothing was left behind") from error
    finally:
        with suppress(OSError):  # they are empty where it failed
            for parent in missing:
                parent.rmdir()


def _publish(path: Path, out: Path, ours: Callable[[Path], bool], force: bool) -> Path | None:
    """Renames the finished export to `out`; returns the backup of what was there, or None."""
    there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    replaced = force and there and ours(out)
    if path.is_file() and (replaced or not there):
        _place(path, out, new=not replaced)
        return None
    if not force or not there:
        _place(path, out, new=True)
        return None
    backup = out.rename(out.with_name(f"{out.name}.backup-{token_hex(4)}"))
    try:
        _place(path, out, new=True)
    except BaseException:
        if not out.exists():
            backup.rename(out)
        raise
    with suppress(OSError):
        if replaced and ours(backup):
            backup.rename(path.with_name(backup.name))  # it is removed with the hidden folder
            return None
    return backup


def _place(path: Path, out: Path, *, new: bool) -> None:
    """Raises ExportError where something has come to be there meanwhile."""
    try:
        if path.is_file():
            put(path, out, new=new)
        else:
            path.rename(out)  # fails where there is a folder that is not empty
    except OSError as error:
        if not out.exists():
            raise
        raise ExportError(
            f"{out} was written by another program meanwhile, and is left as it is: give another name, or --force to "
            "replace it"
        ) from error
