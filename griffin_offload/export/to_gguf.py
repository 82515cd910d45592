"""Writes the pruned model as a GGUF file for llama.cpp, layer by layer as the sweep passes.

Our own reader reads the header back before any weight is read, and refuses models that a header cannot describe.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.gguf.config import GGUF_ARCHS, config_fields, written_as, written_types
from ..checkpoint.gguf.decode import interleaved
from ..checkpoint.gguf.header import read_gguf
from ..checkpoint.gguf.link import gguf_link
from ..checkpoint.gguf.rope import FACTORS, rope_factors
from ..checkpoint.gguf.tokenizer import vocabulary_fields
from ..checkpoint.gguf.writer import GgufWriter, Layout, layout
from ..errors import CheckpointError, ExportError, UnsupportedArchitecture
from ..memory.heap import trim_heap
from ..sources.gguf_convert import check_written, tensor_names
from ..version import __version__
from .copied import copied_files
from .pruned_model import Export, ExportJob, ExportSource, Smaller, smaller_model, write_pruned
from .publish import new_output, real_path, require_new

GGUF_MULTIPLE = 32  # of neurons: q8_0, and most types that llama.cpp makes of a file, have blocks of 32 numbers
BLOCK = 32
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
OURS = "griffin."


def require_gguf(model_type: str) -> None:
    """Raises UnsupportedArchitecture for a type whose GGUF form we do not know."""
    if written_as(model_type) is None:
        raise UnsupportedArchitecture(
            f"model type {model_type!r} cannot be written as GGUF ({', '.join(written_types())} can): "
            "use --format safetensors"
        )


def export_gguf(job: ExportJob, kind: str, multiple: int, tokenizer: Any) -> Export:
    """Run the sweep over the samples and write what it keeps: matrices in `kind` (of --gguf-type), no block with
    fewer than `multiple` neurons. Raises ExportError, CheckpointError, NumericError."""
    out = checked_file(job.out, job.request, job.force)
    copied_files(job.source.path, job.reader.files)  # the tokenizer's texts go into the file
    smaller = smaller_model(job.skeleton, job.plan, multiple)
    architecture = written_as(job.layout.config.model_type)
    assert architecture, "require_gguf comes first"
    config = smaller.config
    if "sliding_window" not in GGUF_ARCHS[architecture].fields.values():  # up to a window's length it is the same
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        config.max_position_embeddings = min(window, config.max_position_embeddings)
    names = _names(smaller, architecture)
    factors = rope_factors(config) if config.rope_parameters.get("rope_type") == "llama3" else None
    tensors = {names[name]: (shape, _kind(shape, kind)) for name, shape in smaller.shapes.items()}
    if factors is not None:
        tensors[FACTORS] = tuple(factors.shape), "F32"

    def lay_out(job: ExportJob) -> Layout:
        fields = _general(job, architecture, kind) | config_fields(config, architecture)
        return layout(fields | _vocabulary(job, tokenizer), tensors)

    laid_out = lay_out(job)
    total = laid_out.bytes
    with new_output(out, total, _is_export, job.force) as output, GgufWriter(output.path, laid_out) as writer:
        del laid_out  # a large vocabulary's header: it is in the file by now
        trim_heap()  # of which the plan knows nothing
        if factors is not None:
            _all(writer.write_pieces(FACTORS, [factors]))
        _check(output.path, config, job.source)
        written = write_pruned(job, smaller, _AsLlamaCpp(writer, names, architecture, config))
        if written.skipped:
            writer.write_header(lay_out(job.finished(written.skipped)))
    return Export(out, (out.name,), total, output.backup, written.scores, written.skipped)


class _AsLlamaCpp:
    """A writer that takes the model's tensors by its own names, and changes names and values as llama.cpp wants."""

    def __init__(self, writer: GgufWriter, names: dict[str, str], architecture: str, config: Any) -> None:
        self._writer, self._names = writer, names
        self._architecture, self._config = GGUF_ARCHS[architecture], config

    def write(self, name: str, tensor: Tensor) -> None:
        _all(self.write_pieces(name, [tensor]))

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> Iterator[int]:
        title = self._names[name]
        heads, offset = self._architecture.changes(self._config, title)
        if heads:
            pieces = (part for piece in pieces for part in interleaved(piece, heads))
        return self._writer.write_pieces(title, pieces, offset)


def _all(pieces: Iterator[int]) -> None:
    for _ in pieces:
        pass


def _general(job: ExportJob, architecture: str, kind: str) -> dict[str, Any]:
    plan, selection, source = job.plan, job.selection, job.source
    kept = [layer.kept for layer in plan.layers]
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": f"{source.name}, pruned {'for any prompt' if source.calibration else 'to one prompt'}",
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[kind],
        f"{OURS}version": __version__,
        f"{OURS}request": job.request,
        f"{OURS}method": source.method(selection),
        f"{OURS}seed": selection.seed,
        f"{OURS}source_model": source.name,
        f"{OURS}sparsity": float(plan.sparsity),
        f"{OURS}neurons": plan.layers[0].neurons,
        f"{OURS}kept": kept,
        **{OURS + name: json.dumps(v) if isinstance(v, dict) else v for name, v in source.facts(selection).items()},
    }


def _vocabulary(job: ExportJob, tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's fields; of a model that came as a GGUF file, that file's own, as they are."""
    if link := gguf_link(job.source.path):
        file = read_gguf(link.file, link.file.name)
        return {key: file.raw(key) for key in file.fields if key.startswith("tokenizer.")}
    end = job.skeleton.model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return vocabulary_fields(tokenizer, job.layout.config.vocab_size, ends, job.source.name)


def _names(smaller: Smaller, architecture: str) -> dict[str, str]:
    """The model's names -> the file's."""
    found = tensor_names(architecture, smaller.shapes, smaller.config.num_hidden_layers)
    if unknown := [name for name, title in found.items() if title is None]:
        raise ExportError(f"a GGUF file of {architecture} has no place for {unknown[0]}: use --format safetensors")
    return {name: title for name, title in found.items() if title}


def _kind(shape: tuple[int, ...], kind: str) -> str:
    """gguf's type of a tensor: vectors are float32, as llama.cpp wants them; rows of no whole blocks stay bfloat16."""
    if len(shape) == 1:
        return "F32"
    return "BF16" if kind == "q8_0" and shape[-1] % BLOCK else kind.upper()


def _check(path: Path, config: Any, source: ExportSource) -> None:
    try:
        check_written(path, config)
    except (CheckpointError, UnsupportedArchitecture) as error:
        reason = str(error).replace(path.name, source.name)
        raise ExportError(f"{reason} (as it would be in a GGUF file): use --format safetensors") from None


def checked_file(out: Path, request: str, force: bool) -> Path:
    """The path of a new .gguf file, without links. Raises ExportError, AlreadyThere."""
    out = real_path(out, "file")
    if out.is_dir():
        raise ExportError(f"{out} is a folder: give the name of a new .gguf file")
    if out.suffix.lower() != ".gguf":
        raise ExportError(f"{out} does not end in .gguf, by which a GGUF file is known")
    if out.exists() and not force:
        require_new(out, _fields(out).get(f"{OURS}request") == request)
    return out


def _is_export(path: Path) -> bool:
    return f"{OURS}version" in _fields(path)


def _fields(path: Path) -> Mapping[str, Any]:
    """Of a file's header; {} where it cannot be read."""
    try:
        return read_gguf(path, path.name).fields
    except (CheckpointError, UnsupportedArchitecture, OSError):
        return {}
