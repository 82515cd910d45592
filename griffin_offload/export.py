"""A pruned checkpoint that plain transformers loads, written layer by layer as the sweep passes.

Nothing but one layer at a time is held. All is written to a temporary folder beside the target, which is renamed
at the end: an export is there whole, or not at all.
"""

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import __version__
from .errors import ExportError
from .folder import one_line
from .plan import Kept, Plan
from .prefill import OnLayer, Pruner, Stream, Sweep, load_outside, passing_layers
from .selection import Selection
from .skeleton import Block, Rows, Skeleton
from .units import MIB, format_bytes
from .weights.reader import Reader
from .weights.writer import CheckpointWriter

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
RESERVE = 64 * MIB  # of disk, left free


@dataclass(frozen=True)
class Source:
    """What an export is made of, for its card."""

    model: str
    path: Path
    prompt_ids: list[int]
    prompt_text: str

    @property
    def name(self) -> str:
        """As others may know it: of a folder, not where it lies."""
        return self.path.name if Path(self.model).exists() else self.model

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(self.prompt_text.encode()).hexdigest()


@dataclass(frozen=True)
class Export:
    """What was written. `backup`: where an existing folder that was no export went."""

    path: Path
    files: tuple[str, ...]
    bytes: int
    backup: Path | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "backup": self.backup and str(self.backup)}


def export_checkpoint(
    skeleton: Skeleton,
    reader: Reader,
    plan: Plan,
    selection: Selection,
    source: Source,
    out: Path,
    force: bool,
    on_layer: OnLayer | None,
) -> Export:
    """Run the sweep over the prompt and write what it keeps. Raises ExportError, CheckpointError, NumericError."""
    out = _real_path(out)
    config = _config(skeleton, plan, source)
    widths = _widths(skeleton, config)
    shapes = _shapes(skeleton, widths)
    _check_config(skeleton, config, shapes)
    needed = sum(torch.Size(shape).numel() for shape in shapes.values()) * skeleton.dtype.itemsize
    with _new_folder(out, force, needed) as folder:
        layers = passing_layers(skeleton, plan.kept)
        experts: list[Any] = []
        buffers = {name: buffer.dtype for name, buffer in skeleton.buffers.items()}
        with CheckpointWriter(folder, shapes, skeleton.dtype, others=buffers) as writer:

            def write_layer(index: int) -> None:
                layer, passed = skeleton.layers[index], layers[index]
                tensors = cast("dict[str, Tensor]", passed.tensors)  # nothing is packed
                for name in layer.fixed:
                    writer.write(layer.prefix + name, tensors[name])
                for block, width in zip(layer.blocks, widths[index], strict=True):
                    for name, rows in block.rows.items():
                        padded = _pad(tensors[name], shapes[layer.prefix + name], block, rows, width)
                        writer.write(layer.prefix + name, padded)
                found = {block.path: e.tolist() for block, e in zip(layer.blocks, passed.experts, strict=True)}
                experts.append(found if len(found) > 1 else next(iter(found.values()), []))

            stream = Stream(
                skeleton,
                reader,
                layers,
                copies=False,
                steady=plan.steady_heap,
                on_layer=on_layer,
                on_finished=write_layer,
            )
            sweep = Sweep(stream, Pruner(skeleton, layers, selection))
            try:
                load_outside(skeleton, reader, "cpu")
                for name in skeleton.outside:
                    parts: Iterable[Tensor] = [skeleton.model.get_parameter(name).data]
                    if name == skeleton.table:
                        parts = reader.pieces(skeleton.pieces[name][0].info, skeleton.dtype)
                    for _ in writer.write_pieces(name, parts):
                        pass
                for name in skeleton.buffers:
                    writer.write(name, skeleton.model.get_buffer(name))
                with sweep, torch.no_grad():
                    skeleton.model(torch.tensor([source.prompt_ids]), use_cache=False, logits_to_keep=1)
            finally:
                skeleton.unload()
        _write_config(config, source, folder)
        _write_card(skeleton, plan, selection, source, folder, experts)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        total = sum(path.stat().st_size for path in folder.iterdir())
        backup = _publish(folder, out)
    return Export(out, files, total, backup)


def _config(skeleton: Skeleton, plan: Plan, source: Source) -> dict[str, Any]:
    """The exported config.json: the source's, with the sizes of what is kept.

    A layer that keeps fewer neurons than another is filled up with zeros. Raises ExportError."""
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text())
    config.pop("torch_dtype", None)
    sizes: dict[str, int] = {}
    for layer, kept in zip(skeleton.layers, plan.kept, strict=True):
        for block, k in zip(layer.blocks, kept, strict=True):
            if not block.size:
                raise ExportError(f"a config of type {skeleton.config.model_type!r} has no field for fewer neurons")
            width = -(-max(1, k) // _ratio(skeleton, block))
            if block.routed:  # torch's grouped products want rows of whole 16 bytes
                width += -width % (16 // skeleton.dtype.itemsize)
            sizes[block.size] = max(sizes.get(block.size, 1), width)
    dtype = str(skeleton.dtype).removeprefix("torch.")
    return config | sizes | {"dtype": dtype, "architectures": [type(skeleton.model).__name__]}


def _ratio(skeleton: Skeleton, block: Block) -> int:
    """Neurons of a block over what the config's field says (several shared experts are one block)."""
    return max(1, block.neurons // (getattr(skeleton.config, block.size, None) or block.neurons))


def _widths(skeleton: Skeleton, config: dict[str, Any]) -> Kept:
    """Neurons of every block in the exported checkpoint."""
    return tuple(tuple(config[b.size] * _ratio(skeleton, b) for b in layer.blocks) for layer in skeleton.layers)


def _shapes(skeleton: Skeleton, widths: Kept) -> dict[str, tuple[int, ...]]:
    """Every tensor of the exported checkpoint, by name."""
    shapes = {name: skeleton.shapes[name] for name in skeleton.outside}
    for layer, width in zip(skeleton.layers, widths, strict=True):
        shapes |= {layer.prefix + name: shape for name, shape in skeleton.kept_shapes(layer, width).items()}
    return shapes | {name: tuple(buffer.shape) for name, buffer in skeleton.buffers.items()}


def _check_config(skeleton: Skeleton, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ExportError unless the exported config makes a model of just these tensors."""
    smaller = copy.deepcopy(skeleton.config)
    try:
        for name in {block.size for layer in skeleton.layers for block in layer.blocks}:
            setattr(smaller, name, config[name])
        loaded = Skeleton(smaller, skeleton.dtype, skeleton.entry)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ExportError(f"no config can describe the pruned model: {one_line(error)}") from None
    for name, shape in shapes.items():
        there = loaded.shapes.get(name, shape)
        if there != shape:
            raise ExportError(
                f"no config can describe the pruned model: {name} has the shape {list(shape)}, "
                f"and {list(there)} in the model that the config makes"
            )


def _pad(tensor: Tensor, shape: tuple[int, ...], block: Block, rows: Rows, width: int) -> Tensor:
    """A compact tensor with neurons of zeros behind its own, which add nothing to any sum."""
    if tuple(tensor.shape) == shape:
        return tensor
    axis = rows.axis + bool(block.routed)
    own = tensor.shape[axis] // (2 if rows.halves else 1)
    place = replace(rows, neurons=width).index(torch.arange(own))
    return torch.zeros(shape, dtype=tensor.dtype).index_copy_(axis, place, tensor)


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


def _write_config(config: dict[str, Any], source: Source, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in COPIED:
        for path in source.path.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)


def _write_card(
    skeleton: Skeleton, plan: Plan, selection: Selection, source: Source, folder: Path, experts: list[Any]
) -> None:
    neurons = plan.layers[0].neurons
    kept = [layer.kept for layer in plan.layers]
    facts = {
        "griffin_offload": __version__,
        "method": f"GRIFFIN (arXiv:2404.01365), {selection.name}",
        "seed": selection.seed,
        "source_model": source.name,
        "model_type": skeleton.config.model_type,
        "sparsity": plan.sparsity,
        "neurons": neurons,
        "kept": kept[0] if len(set(kept)) == 1 else kept,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "prompt_sha256": source.prompt_sha256,
        "prompt_tokens": len(source.prompt_ids),
        "experts": experts,
    }
    (folder / "griffin.json").write_text(json.dumps(facts) + "\n")
    card = CARD.format(
        model=source.name,
        sparsity=plan.sparsity,
        kept=kept[0] if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}",
        neurons=neurons,
        resident=format_bytes(plan.resident_bytes),
        full=format_bytes(plan.full_bytes),
        sha=source.prompt_sha256,
        tokens=len(source.prompt_ids),
    )
    (folder / "README.md").write_text(card)


CARD = """---
library_name: transformers
tags:
- griffin-offload
- pruned
---
# {model}, pruned to one prompt

Made by Griffin Offload from `{model}` with GRIFFIN (arXiv:2404.01365): {kept} of the {neurons} feed-forward neurons
of every layer are kept (sparsity {sparsity:g}), chosen by one prompt of {tokens} tokens. {resident} instead of {full}.

- source model: `{model}`, whose licence applies to these weights too
- prompt, SHA-256 of its text: `{sha}`
- which neurons: `experts` in `griffin.json`, one list a layer

## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## What it is good for, and what not

For answering that prompt, and prompts much like it (the same document, the same style of task). It is a special
model: on other subjects, other languages and long reasoning it is worse than the source model, and small models lose
more than large ones. In Griffin itself the prompt is read by the full model and only the answer by the pruned one;
here the pruned model reads the prompt too.
"""
