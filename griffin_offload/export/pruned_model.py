"""The pruned model, whatever the format it is written in: its sizes, its config, and the sweep that writes it.

The prompt, or all calibration samples, pass a layer before its neurons are chosen. One layer at a time is held.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..checkpoint.reader import Reader
from ..errors import ExportError, one_line
from ..memory.spill import Spill
from ..model.layout import Block, ModelLayout, NeuronRows, Shape
from ..model.skeleton import Skeleton
from ..offload.folding import CountTokens, Folding, sample_tokens
from ..offload.layer_hook import HookSequence, LayerHook
from ..offload.lockstep import forwards, passing
from ..offload.neuron_scores import Scorer, scores_of
from ..offload.pruner import KeepNeurons, Pruner
from ..offload.resident_layer import ResidentLayer
from ..offload.skip_by_prompt import Saturation
from ..options import OnLayer
from ..paths import source_name
from ..planning.plan import Plan, with_kept
from ..planning.request import emptied
from ..planning.sizes import Kept, model_sizes
from ..pruning.calibration import Calibration
from ..pruning.prior import Scores
from ..pruning.selection import Selection
from ..pruning.statistic import STATISTICS


@dataclass(frozen=True)
class ExportSource:
    """The model, and what chooses its neurons: a prompt, or many samples, whose hidden states wait in `spill`."""

    model: str
    path: Path
    prompt_ids: list[int]
    prompt_text: str
    calibration: Calibration | None = None
    spill: Spill | None = None

    @property
    def name(self) -> str:
        return source_name(self.model, self.path)

    @property
    def samples(self) -> Sequence[list[int]]:
        return self.calibration.samples if self.calibration else [self.prompt_ids]

    def method(self, selection: Selection) -> str:
        if self.calibration:
            return f"{self.calibration.statistic.title}, static"
        return f"{STATISTICS['griffin'].title}, {selection.name}"

    def facts(self, selection: Selection) -> dict[str, Any]:
        """What chose the neurons, for griffin.json and its like."""
        if self.calibration:
            return {"calibration": self.calibration.to_json()}
        prior = {"prior": selection.prior_facts(len(self.prompt_ids))} if selection.prior else {}
        sha256 = hashlib.sha256(self.prompt_text.encode()).hexdigest()
        return {"prompt_sha256": sha256, "prompt_tokens": len(self.prompt_ids), **prior}


@dataclass(frozen=True)
class Export:
    """What was written. `backup`: where an existing folder that was no export went; `scores`: of every neuron, by
    which the kept ones were chosen; `skipped`: layers whose blocks are zeros; `rest`: what became of the neurons that
    are not kept, and why (Plan.rest_to_json)."""

    path: Path
    files: tuple[str, ...]
    bytes: int
    backup: Path | None
    scores: Scores = field(default=(), repr=False, compare=False)
    skipped: tuple[int, ...] = ()
    rest: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        files, backup = list(self.files), self.backup and str(self.backup)
        facts = {"path": str(self.path), "files": files, "bytes": self.bytes, "backup": backup}
        return {**facts, "skipped": list(self.skipped), "rest": self.rest}


@dataclass(frozen=True)
class ExportJob:
    """One export: what is pruned how, from where, to where. `request`: a hash of all that was asked for; `force`:
    replace what is there."""

    skeleton: Skeleton
    reader: Reader
    plan: Plan
    selection: Selection
    source: ExportSource
    out: Path
    request: str
    force: bool = False
    on_layer: OnLayer | None = None

    @property
    def layout(self) -> ModelLayout:
        return self.skeleton.layout

    @property
    def dtype(self) -> str:
        return str(self.layout.dtype).removeprefix("torch.")

    def finished(self, skipped: Sequence[int]) -> "ExportJob":
        """The job with the plan as it came out: these layers' blocks are empty."""
        plan = self.plan
        return replace(self, plan=with_kept(plan, model_sizes(self.layout), emptied(plan.kept, skipped)))


@dataclass(frozen=True)
class Smaller:
    """The pruned model: `sizes`, the config's fields for its neurons; `widths`, neurons by layer and block, where those
    that keep fewer than another are filled up with zeros; `shapes`, every tensor by name; `config`, transformers'."""

    sizes: dict[str, int]
    widths: Kept
    shapes: dict[str, Shape]
    config: Any


def smaller_model(skeleton: Skeleton, plan: Plan, least: int = 1) -> Smaller:
    """What is left of a model by the plan; no block has fewer than `least` neurons (of zeros, if need be).

    Raises ExportError where no config can say it."""
    layout = skeleton.layout
    sizes = _sizes(layout, plan, least)
    widths = tuple(tuple(sizes[b.size] * _ratio(layout, b) for b in layer.blocks) for layer in layout.layers)
    shapes = _shapes(layout, widths)
    return Smaller(sizes, widths, shapes, _checked_config(skeleton, sizes, shapes))


class Written(NamedTuple):
    """By layer: `kept_neurons`, as lists of numbers, and the `scores` that they were chosen by. `skipped`: layers whose
    blocks were skipped."""

    kept_neurons: list[Any]
    scores: Scores
    skipped: tuple[int, ...]


class Writer(Protocol):
    """Where an export's tensors go, by the model's names, in any order; written again, the last one counts."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> Iterator[int]: ...


class LayerWriter(LayerHook):
    """Writes each layer once its neurons are gathered, those that keep fewer filled up with zeros."""

    def __init__(self, layout: ModelLayout, layers: Sequence[ResidentLayer], smaller: Smaller, writer: Writer) -> None:
        self._layout, self.layers, self._smaller, self._writer = layout, layers, smaller, writer
        self.kept_neurons: list[Any] = []

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        of_layer, passed = self._layout.layers[layer], self.layers[layer]
        tensors = cast("dict[str, Tensor]", passed.tensors)  # nothing is quantized
        for name in of_layer.fixed:
            self._writer.write(of_layer.prefix + name, tensors[name])
        for block, width in zip(of_layer.blocks, self._smaller.widths[layer], strict=True):
            for name, rows in block.rows.items():
                full = of_layer.prefix + name
                self._writer.write(full, _pad(tensors[name], self._smaller.shapes[full], block, rows, width))
        each = zip(of_layer.blocks, passed.kept_neurons, strict=True)
        found = {block.path: chosen.tolist() for block, chosen in each}
        self.kept_neurons.append(found if len(found) > 1 else next(iter(found.values()), []))


def write_pruned(job: ExportJob, smaller: Smaller, writer: Writer) -> Written:
    """Run the sweep over the source's samples and write what it keeps; for blocks that a prompt skips, zeros in their
    place, since a config has one width for all layers.

    Raises CheckpointError, NumericError."""
    skeleton, layout, source = job.skeleton, job.layout, job.source
    saturation = Saturation(skeleton, job.plan.skip) if job.plan.skip else None
    written: list[LayerWriter] = []

    def hooks(layers: list[ResidentLayer]) -> dict[str, Any]:
        _write_outer(job, writer)  # before layers are read ahead: a reader serves one thread at a time
        written.append(LayerWriter(layout, layers, smaller, writer))
        tokens = sample_tokens([len(ids) for ids in source.samples]) if job.plan.fold else []
        folding = Folding(job.plan.fold, tokens[0]) if job.plan.fold else None
        if source.calibration:
            chosen: list[LayerHook] = [
                Scorer(skeleton, layers, source.calibration, folding),
                KeepNeurons(layout, layers, job.selection, folding),
            ]
        else:
            chosen = [Pruner(layout, skeleton.modules, layers, job.selection, folding=folding)]
        each: list[LayerHook] = [CountTokens(folding, of_sample) for of_sample in tokens] if folding else []
        return {"hook": HookSequence([*chosen, written[0]]), "job_hooks": [saturation] if saturation else each}

    with passing(
        skeleton, job.reader, job.plan, "cpu", hooks=hooks, spill=source.spill, on_layer=job.on_layer
    ) as lockstep:
        lockstep.run(forwards(skeleton, source.samples, "cpu"))
    (layer_writer,) = written
    skipped = saturation.skipped() if saturation else []
    for index in skipped:  # which they are, the last layer alone could tell
        layer_writer.kept_neurons[index] = []
        for name in layout.layers[index].neuron_tensors:
            full = layout.layers[index].prefix + name
            writer.write(full, torch.zeros(smaller.shapes[full], dtype=layout.dtype))
    return Written(layer_writer.kept_neurons, scores_of(layer_writer.layers), tuple(skipped))


def _write_outer(job: ExportJob, writer: Writer) -> None:
    """Embeddings, final norm, lm_head and buffers, which are loaded; an embedding that is left on disk in pieces."""
    model, layout = job.skeleton.model, job.layout
    for name in layout.outer:
        parts: Iterable[Tensor] = [model.get_parameter(name).data]
        if name == layout.table:
            parts = job.reader.pieces(layout.pieces[name][0].info, layout.dtype)
        for _ in writer.write_pieces(name, parts):
            pass
    for name in layout.buffers:
        writer.write(name, model.get_buffer(name))


def _sizes(layout: ModelLayout, plan: Plan, least: int) -> dict[str, int]:
    """The config's fields for the neurons of a block, as many as any layer keeps. Raises ExportError."""
    sizes: dict[str, int] = {}
    for layer, kept in zip(layout.layers, plan.kept, strict=True):
        for block, k in zip(layer.blocks, kept, strict=True):
            if not block.size:
                raise ExportError(f"a config of type {layout.config.model_type!r} has no field for fewer neurons")
            width = -(-max(least, k) // _ratio(layout, block))
            if block.routed:  # torch's grouped products want rows of whole 16 bytes
                width += -width % (16 // layout.dtype.itemsize)
            sizes[block.size] = max(sizes.get(block.size, 1), width)
    return sizes


def _ratio(layout: ModelLayout, block: Block) -> int:
    """Neurons of a block over what the config's field says (several shared experts are one block)."""
    return max(1, block.neurons // (getattr(layout.config, block.size, None) or block.neurons))


def _shapes(layout: ModelLayout, widths: Kept) -> dict[str, Shape]:
    """Every tensor of the exported checkpoint, by name."""
    shapes = {name: layout.shapes[name] for name in layout.outer}
    for layer, width in zip(layout.layers, widths, strict=True):
        shapes |= {layer.prefix + name: shape for name, shape in layout.kept_shapes(layer, width).items()}
    return shapes | {name: shape for name, (shape, _) in layout.buffers.items()}


def _checked_config(skeleton: Skeleton, sizes: dict[str, int], shapes: dict[str, Shape]) -> Any:
    """transformers' config of the pruned model. Raises ExportError unless it makes a model of just these tensors."""
    smaller = copy.deepcopy(skeleton.config)
    try:
        for name, size in sizes.items():
            setattr(smaller, name, size)
        loaded = Skeleton(smaller, skeleton.layout.dtype, skeleton.entry).layout
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
