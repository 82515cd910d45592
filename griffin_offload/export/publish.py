"""Writes an export's file or folder beside its place, and puts it there whole, or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from ..errors import ExportError
from ..files import DISK_RESERVE, free_disk, reason
from ..units import format_bytes


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


@contextmanager
def new_output(out: Path, needed: int, is_export: Callable[[Path], bool]) -> Iterator[Output]:
    """A path in a temporary folder beside `out`. What the block writes there becomes `out`, or is removed if it fails.

    Something in that place is replaced if `is_export` says so, else kept as a backup. Raises ExportError if `out`
    cannot be written or the disk has less than `needed` bytes free."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := free_disk(out.parent)) < (needed := needed + DISK_RESERVE):
            raise ExportError(f"{out.parent} has {format_bytes(free)} free; the export needs {format_bytes(needed)}")
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {reason(error)}") from None
    output = Output(work / out.name)
    try:
        yield output
        output.path.chmod(0o755 if output.path.is_dir() else 0o644)
        output.backup = _publish(output.path, out, is_export)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {reason(error)}; nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(path: Path, out: Path, is_export: Callable[[Path], bool]) -> Path | None:
    """Renames the finished export to `out`; returns the backup of what was there, or None."""
    there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    ours = there and is_export(out)
    if not there or (ours and out.is_file()):
        path.replace(out)
        return None
    backup = out.rename(out.with_name(f"{out.name}.backup-{token_hex(4)}"))
    try:
        path.replace(out)
    except BaseException:
        if not out.exists():
            backup.rename(out)
        raise
    if not ours:
        return backup
    shutil.rmtree(backup)
    return None
