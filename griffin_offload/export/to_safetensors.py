"""Writes a pruned checkpoint that plain transformers loads, layer by layer as the sweep passes."""

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.quantized.find import QUANTIZATION
from ..checkpoint.safetensors_writer import CheckpointWriter
from ..errors import ExportError
from ..files import reason
from ..inputs import read_input
from .card import write_card
from .pruned_model import Export, ExportJob, ExportSource, Smaller, smaller_model, write_pruned
from .publish import is_export, new_output, read_facts, real_path, require_new

COPIED = """tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.model chat_template*
    generation_config.json LICENSE* USE_POLICY* NOTICE*""".split()  # noqa: SIM905


def export_checkpoint(job: ExportJob) -> Export:
    """Run the sweep over the samples and write what it keeps. Raises ExportError, CheckpointError, NumericError."""
    out, layout = checked_folder(job.out, job.request, job.force), job.layout
    smaller = smaller_model(job.skeleton, job.plan)
    needed = sum(torch.Size(shape).numel() for shape in smaller.shapes.values()) * layout.dtype.itemsize
    buffers = {name: dtype for name, (_, dtype) in layout.buffers.items()}
    with new_output(out, needed, is_export, job.force) as output:
        folder = output.path
        folder.mkdir()
        with CheckpointWriter(folder, smaller.shapes, layout.dtype, others=buffers) as writer:
            written = write_pruned(job, smaller, writer)
        _write_config(_config(job, smaller), job.source, folder)
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


def _write_config(config: dict[str, Any], source: ExportSource, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in sorted(os.listdir(source.path)):  # glob finds nothing in a folder that it cannot read
        path = source.path / name
        if any(fnmatch(name, pattern) for pattern in COPIED) and path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / name)
