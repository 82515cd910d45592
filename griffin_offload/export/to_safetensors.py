"""A pruned checkpoint that plain transformers loads, written layer by layer as the sweep passes.

All is written to a temporary folder beside the target, which is renamed at the end: an export is there whole, or not
at all.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.safetensors_writer import CheckpointWriter
from ..errors import ExportError
from ..units import format_bytes
from .card import write_card
from .pruned_model import RESERVE, Export, ExportJob, ExportSource, Smaller, smaller_model, write_pruned

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)


def export_checkpoint(job: ExportJob) -> Export:
    """Run the sweep over the samples and write what it keeps. Raises ExportError, CheckpointError, NumericError."""
    out, layout = _real_path(job.out), job.layout
    smaller = smaller_model(job.skeleton, job.plan)
    needed = sum(torch.Size(shape).numel() for shape in smaller.shapes.values()) * layout.dtype.itemsize
    buffers = {name: dtype for name, (_, dtype) in layout.buffers.items()}
    with _new_folder(out, job.force, needed) as folder:
        with CheckpointWriter(folder, smaller.shapes, layout.dtype, others=buffers) as writer:
            written = write_pruned(job, smaller, writer)
        _write_config(_config(job, smaller), job.source, folder)
        write_card(job.finished(written.skipped), folder, written.kept_neurons)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        total = sum(path.stat().st_size for path in folder.iterdir())
        backup = _publish(folder, out)
    return Export(out, files, total, backup, written.scores, written.skipped)


def _config(job: ExportJob, smaller: Smaller) -> dict[str, Any]:
    """The exported config.json: the source's, with the sizes of what is kept."""
    config: dict[str, Any] = json.loads((job.source.path / "config.json").read_text())
    config.pop("torch_dtype", None)
    return config | smaller.sizes | {"dtype": job.dtype, "architectures": [type(job.skeleton.model).__name__]}


def _real_path(out: Path) -> Path:
    """Where links and dots lead: a link cannot be replaced by a folder, nor `.` be renamed."""
    try:
        if "\0" in str(out):
            raise ValueError
        return out.resolve()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link to itself, before Python 3.13
        raise ExportError(f"{str(out)!r} cannot be written: it is no name of a folder") from None


@contextmanager
def _new_folder(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """A temporary folder beside `out`, gone afterwards unless it was renamed. Raises ExportError for a bad `out`."""
    try:
        if out.exists() and not out.is_dir():
            raise ExportError(f"{out} is a file: give the name of a new folder")
        if out.is_dir() and any(out.iterdir()) and not force:
            raise ExportError(f"{out} exists and is not empty: give another folder, or --force to replace it")
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed + RESERVE:
            raise ExportError(
                f"{out.parent} has {format_bytes(free)} free; the export needs {format_bytes(needed + RESERVE)}"
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}") from None
    try:
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}; nothing was left behind") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> Path | None:
    """Rename the finished folder. An earlier export in its place is replaced; anything else is kept as a backup."""
    backup = None
    if out.is_dir() and any(out.iterdir()):
        backup = Path(tempfile.mkdtemp(prefix=f"{out.name}.backup-", dir=out.parent))
    try:
        if backup:
            out.replace(backup)
        folder.replace(out)
    except BaseException:
        if backup and not out.exists():
            backup.replace(out)
        elif backup:
            backup.rmdir()
        raise
    if backup and (backup / "griffin.json").exists():
        shutil.rmtree(backup)
        backup = None
    return backup


def _write_config(config: dict[str, Any], source: ExportSource, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in COPIED:
        for path in source.path.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
