"""What every export holds, whatever its format: the sizes of the pruned model, and the sweep that writes it.

The prompt, or all samples of a static choice, pass a layer before its neurons are chosen. Nothing but one layer at a
time is held.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..checkpoint.reader import Reader
from ..errors import ExportError, one_line
from ..memory.spill import Spill
from ..model.layout import Block, NeuronRows
from ..model.skeleton import Skeleton
from ..offload.layer_stream import LayerStream
from ..offload.lockstep import Lockstep
from ..offload.neuron_scores import Scorer, forwards, scores_of
from ..offload.outer_weights import load_outer_weights
from ..offload.resident_layer import passing_layers
from ..offload.skip_by_prompt import Saturation
from ..offload.sweep import Pruner
from ..options import OnLayer
from ..paths import source_name
from ..planning.plan import Plan
from ..planning.sizes import Kept
from ..pruning.calibration import Calibration
from ..pruning.prior import Scores
from ..pruning.selection import Selection
from ..pruning.statistic import STATISTICS


@dataclass(frozen=True)
class ExportSource:
    """What an export is made of: the model, and what chooses its neurons, a prompt or many samples, whose states wait
    for each other."""

    model: str
    path: Path
    prompt_ids: list[int]
    prompt_text: str
    static: Calibration | None = None
    waiting: Spill | None = None

    @property
    def name(self) -> str:
        return source_name(self.model, self.path)

    @property
    def samples(self) -> Sequence[list[int]]:
        return self.static.samples if self.static else [self.prompt_ids]

    def method(self, selection: Selection) -> str:
        if self.static:
            return f"{self.static.statistic.title}, static"
        return f"{STATISTICS['griffin'].title}, {selection.name}"

    def facts(self, selection: Selection) -> dict[str, Any]:
        """What chose the neurons, for griffin.json and its like."""
        if self.static:
            return {"calibration": self.static.to_json()}
        prior = {"prior": selection.prior_facts} if selection.prior else {}
        sha256 = hashlib.sha256(self.prompt_text.encode()).hexdigest()
        return {"prompt_sha256": sha256, "prompt_tokens": len(self.prompt_ids), **prior}


@dataclass(frozen=True)
class Export:
    """What was written. `backup`: where an existing folder that was no export went; `scores`: of every neuron, which
    the kept_neurons were chosen by; `skipped`: layers whose blocks are zeros."""

    path: Path
    files: tuple[str, ...]
    bytes: int
    backup: Path | None
    scores: Scores = field(default=(), repr=False, compare=False)
    skipped: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        files, backup = list(self.files), self.backup and str(self.backup)
        skipped = list(self.skipped)
        return {"path": str(self.path), "files": files, "bytes": self.bytes, "backup": backup, "skipped": skipped}


@dataclass(frozen=True)
class Smaller:
    """The pruned model: `sizes`, the config's fields for its neurons; `widths`, neurons by layer and block, where those
    that keep fewer than another are filled up with zeros; `shapes`, every tensor by name; `config`, transformers'."""

    sizes: dict[str, int]
    widths: Kept
    shapes: dict[str, tuple[int, ...]]
    config: Any


def smaller_model(skeleton: Skeleton, plan: Plan, least: int = 1) -> Smaller:
    """What is left of a model by the plan; no block has fewer than `least` neurons (of zeros, if need be).

    Raises ExportError where no config can say it."""
    sizes = _sizes(skeleton, plan, least)
    widths = tuple(tuple(sizes[b.size] * _ratio(skeleton, b) for b in layer.blocks) for layer in skeleton.layers)
    shapes = _shapes(skeleton, widths)
    return Smaller(sizes, widths, shapes, _checked_config(skeleton, sizes, shapes))


class Written(NamedTuple):
    """By layer: `experts`, as lists of numbers, and the `scores` that they were chosen by. `skipped`: layers whose
    blocks were left out."""

    kept_neurons: list[Any]
    scores: Scores
    skipped: tuple[int, ...]


class Writer(Protocol):
    """Where an export's tensors go, by the model's names, in any order; written again, the last one counts."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> Iterator[int]: ...


def write_pruned(
    skeleton: Skeleton,
    reader: Reader,
    plan: Plan,
    selection: Selection,
    source: ExportSource,
    smaller: Smaller,
    writer: Writer,
    on_layer: OnLayer | None,
) -> Written:
    """Run the sweep over the source's samples and write what it keeps; of a prompt that leaves blocks out, zeros in
    their place, since a config has one width for all layers.

    Raises CheckpointError, NumericError."""
    layers = passing_layers(skeleton, plan.kept)
    kept_neurons: list[Any] = []

    def write_layer(index: int) -> None:
        layer, passed = skeleton.layers[index], layers[index]
        tensors = cast("dict[str, Tensor]", passed.tensors)  # nothing is packed
        for name in layer.fixed:
            writer.write(layer.prefix + name, tensors[name])
        for block, width in zip(layer.blocks, smaller.widths[index], strict=True):
            for name, rows in block.rows.items():
                padded = _pad(tensors[name], smaller.shapes[layer.prefix + name], block, rows, width)
                writer.write(layer.prefix + name, padded)
        found = {block.path: e.tolist() for block, e in zip(layer.blocks, passed.kept_neurons, strict=True)}
        kept_neurons.append(found if len(found) > 1 else next(iter(found.values()), []))

    stream = LayerStream(
        skeleton,
        reader,
        layers,
        copies=False,
        steady=plan.steady_heap,
        on_layer=on_layer,
        on_finished=write_layer,
    )
    pruner = Pruner(skeleton, layers, selection)
    together = Scorer(skeleton, layers, source.static, pruner) if source.static else pruner
    saturation = Saturation(skeleton, plan.skip) if plan.skip else None
    try:
        load_outer_weights(skeleton, reader, "cpu")
        for name in skeleton.outer:
            parts: Iterable[Tensor] = [skeleton.model.get_parameter(name).data]
            if name == skeleton.table:
                parts = reader.pieces(skeleton.pieces[name][0].info, skeleton.dtype)
            for _ in writer.write_pieces(name, parts):
                pass
        for name in skeleton.buffers:
            writer.write(name, skeleton.model.get_buffer(name))
        with Lockstep(skeleton, stream, together=together, waiting=source.waiting, slots=saturation) as lockstep:
            lockstep.run(forwards(skeleton, source.samples, "cpu"))
    finally:
        skeleton.unload()
    skipped = saturation.skipped() if saturation else []
    for index in skipped:  # which they are, the last layer alone could tell
        kept_neurons[index] = []
        for name in skeleton.layers[index].neuron_tensors:
            full = skeleton.layers[index].prefix + name
            writer.write(full, torch.zeros(smaller.shapes[full], dtype=skeleton.dtype))
    return Written(kept_neurons, scores_of(layers), tuple(skipped))


def _sizes(skeleton: Skeleton, plan: Plan, least: int) -> dict[str, int]:
    """The config's fields for the neurons of a block, as many as any layer keeps. Raises ExportError."""
    sizes: dict[str, int] = {}
    for layer, kept in zip(skeleton.layers, plan.kept, strict=True):
        for block, k in zip(layer.blocks, kept, strict=True):
            if not block.size:
                raise ExportError(f"a config of type {skeleton.config.model_type!r} has no field for fewer neurons")
            width = -(-max(least, k) // _ratio(skeleton, block))
            if block.routed:  # torch's grouped products want rows of whole 16 bytes
                width += -width % (16 // skeleton.dtype.itemsize)
            sizes[block.size] = max(sizes.get(block.size, 1), width)
    return sizes


def _ratio(skeleton: Skeleton, block: Block) -> int:
    """Neurons of a block over what the config's field says (several shared kept_neurons are one block)."""
    return max(1, block.neurons // (getattr(skeleton.config, block.size, None) or block.neurons))


def _shapes(skeleton: Skeleton, widths: Kept) -> dict[str, tuple[int, ...]]:
    """Every tensor of the exported checkpoint, by name."""
    shapes = {name: skeleton.shapes[name] for name in skeleton.outer}
    for layer, width in zip(skeleton.layers, widths, strict=True):
        shapes |= {layer.prefix + name: shape for name, shape in skeleton.kept_shapes(layer, width).items()}
    return shapes | {name: tuple(buffer.shape) for name, buffer in skeleton.buffers.items()}


def _checked_config(skeleton: Skeleton, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> Any:
    """transformers' config of the pruned model. Raises ExportError unless it makes a model of just these tensors."""
    smaller = copy.deepcopy(skeleton.config)
    try:
        for name, size in sizes.items():
            setattr(smaller, name, size)
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
    return smaller


def _pad(tensor: Tensor, shape: tuple[int, ...], block: Block, rows: NeuronRows, width: int) -> Tensor:
    """A compact tensor with neurons of zeros behind its own, which add nothing to any sum."""
    if tuple(tensor.shape) == shape:
        return tensor
    axis = rows.axis + bool(block.routed)
    own = tensor.shape[axis] // (2 if rows.halves else 1)
    place = replace(rows, neurons=width).index(torch.arange(own))
    return torch.zeros(shape, dtype=tensor.dtype).index_copy_(axis, place, tensor)
