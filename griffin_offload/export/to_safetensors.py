"""Writes a pruned checkpoint that plain transformers loads, layer by layer as the sweep passes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.quantized.find import QUANTIZATION
from ..checkpoint.safetensors_writer import CheckpointWriter
from ..errors import ExportError
from ..files import reason
from ..inputs import read_input
from .card import write_card
from .copied import copied_files
from .pruned_model import Export, ExportJob, Smaller, smaller_model, write_pruned
from .publish import is_export, new_output, read_facts, real_path, require_new


def export_checkpoint(job: ExportJob) -> Export:
    """Run the sweep over the samples and write what it keeps. Raises ExportError, CheckpointError, NumericError."""
    out, layout = checked_folder(job.out, job.request, job.force), job.layout
    copied_files(job.source.path, job.reader.files)  # refused before the prompt passes
    smaller = smaller_model(job.skeleton, job.plan)
    needed = sum(torch.Size(shape).numel() for shape in smaller.shapes.values()) * layout.dtype.itemsize
    buffers = {name: dtype for name, (_, dtype) in layout.buffers.items()}
    with new_output(out, needed, is_export, job.force) as output:
        folder = output.path
        folder.mkdir()
        with CheckpointWriter(folder, smaller.shapes, layout.dtype, others=buffers) as writer:
            written = write_pruned(job, smaller, writer)
        for path in copied_files(job.source.path, job.reader.files):
            shutil.copyfile(path, folder / path.name)
        (folder / "config.json").write_text(json.dumps(_config(job, smaller), indent=2) + "\n")
        write_card(job.finished(written.skipped), folder, written.kept_neurons)
        if not is_export(folder, whole=True):
            raise ExportError(f"{out} cannot be written: another program has changed {folder} meanwhile")
        files = tuple(sorted(path.name for path in folder.iterdir()))
        total = sum(path.stat().st_size for path in folder.iterdir())
    return Export(out, files, total, output.backup, written.scores, written.skipped)


def _config(job: ExportJob, smaller: Smaller) -> dict[str, Any]:
    """The exported config.json: the source's (of a multimodal wrapper its text model's), with the sizes of what is
    kept."""
    config: dict[str, Any] = json.loads(read_input(job.source.path / "config.json"))
    own = job.skeleton.config
    if config.get("model_type") != own.model_type:
        config = dict(own.to_diff_dict())
    for name in ("torch_dtype", *QUANTIZATION):
        config.pop(name, None)
    return config | smaller.sizes | {"dtype": job.dtype, "architectures": [type(job.skeleton.model).__name__]}


def checked_folder(out: Path, request: str, force: bool) -> Path:
    """The path of a new folder, without links. Raises ExportError, AlreadyThere."""
    out = real_path(out, "folder")
    try:
        if out.exists() and not out.is_dir():
            raise ExportError(f"{out} is a file: give the name of a new folder")
        if out.is_dir() and any(out.iterdir()) and not force:
            require_new(out, is_export(out, whole=True) and read_facts(out).get("request") == request)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {reason(error)}") from None
    return out
