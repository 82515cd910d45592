"""The sweep: one pass over the layers, which reads each once and leaves its experts behind.

For every decoder layer, in order: wait until it is read ► forward ► statistic ► select ► materialise ► release.
This is the only place that knows the order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .hooks import ObserveNeurons
from .materialize import materialize
from .packed import CHUNK, FORMATS, Scratch, Weight, take_weight
from .precision import NATIVE, Precision
from .resident import ResidentLayer
from .selection import Selection, magnitude
from .skeleton import Block, Skeleton
from .stream import Stream, check_finite
from .weights.arena import Arena, padded
from .weights.reader import Reader

READ_ROWS = 8 * CHUNK  # of a head that is packed as it is read


class Pruner:
    """Chooses and gathers the experts of one prompt (or of one batch, together), layer by layer.

    `weights` (B T,), float32: what each token counts (see neuron_statistic)."""

    def __init__(
        self,
        skeleton: Skeleton,
        layers: Sequence[ResidentLayer],
        selection: Selection,
        weights: Tensor | None = None,
    ) -> None:
        self._skeleton, self._layers = skeleton, layers
        self._selection, self._weights = selection, weights
        self._observers: list[ObserveNeurons] = []

    def begin(self, index: int) -> None:
        """Before a layer's forward over the prompt: observe its z."""
        layer, resident = self._skeleton.layers[index], self._layers[index]
        for block, kept, total in zip(layer.blocks, resident.kept, resident.statistics, strict=True):
            if kept < block.neurons:
                pieces = self._skeleton.pieces_of(layer, block)
                self._observers.append(ObserveNeurons(layer.module, block.path, total.zero_(), self._weights, pieces))

    def end(self, index: int, dense: Mapping[str, Tensor]) -> None:
        """After it: choose, and bring the experts from the dense weights to where they stay."""
        self.stop()
        self.keep(index, dense)

    def keep(self, index: int, dense: Mapping[str, Tensor]) -> None:
        """Choose by the statistics as they are, and gather."""
        layer, resident = self._skeleton.layers[index], self._layers[index]
        for place, (block, kept, total, experts) in enumerate(
            zip(layer.blocks, resident.kept, resident.statistics, resident.experts, strict=True)
        ):
            if kept < block.neurons:
                weights = partial(block_magnitude, block, dense)
                experts.copy_(self._selection.choose(total, kept, index, weights, place))
            elif not resident.moves and (not resident.precision.experts or resident.complete):
                continue
            for name in block.rows:
                how, out = resident.precision, resident.tensors[name]
                materialize(block, name, dense[name], experts, how, out, resident.scratch)

    def stop(self) -> None:
        while self._observers:
            self._observers.pop().remove()


class Slots(Protocol):
    """Who says, when a layer's forward over the prompt is done, which memory its block gets (see skipper.py)."""

    def open(self) -> None: ...

    def left(self, index: int, hidden: Tensor) -> None:
        """`hidden` (..., T, D): what leaves the layer."""

    def close(self) -> None: ...


class Sweep:
    """Arms a skeleton's layers; the next forward of the model is the sweep. Use as a context manager.

    Raises, from within that forward, NumericError for NaN or infinite activations and what the reader raises.
    When the last layer has passed, hooks and staging are gone and the model is resident.
    """

    def __init__(self, stream: Stream, pruner: Pruner, slots: Slots | None = None) -> None:
        self.started = False
        self._stream, self._pruner, self._slots = stream, pruner, slots
        self._dense: Mapping[str, Tensor] = {}

    def __enter__(self) -> "Sweep":
        self._stream.open(self)
        if self._slots:
            self._slots.open()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._slots:
            self._slots.close()
        self._pruner.stop()
        self._stream.close()

    def enter(self, index: int, states: Tensor | None) -> None:
        self.started = True
        self._dense = self._stream.onload(index)
        self._pruner.begin(index)

    def leave(self, index: int, hidden: Tensor) -> None:
        self._stream.check(index, hidden)
        if self._slots:
            self._slots.left(index, hidden)
        self._pruner.end(index, self._dense)
        self._dense = {}
        self._stream.release(index)
        if index + 1 == len(self._stream):
            self._stream.close()


def load_outside(skeleton: Skeleton, reader: Reader, device: str, precision: Precision = NATIVE) -> None:
    """Read embeddings, final norm and head to the device, and buffers that a checkpoint holds. A head that is packed
    is packed as it is read, and the table stays in its file.

    Raises NumericError for NaN or infinite weights."""
    head = skeleton.head if precision.head else None
    skeleton.pack_head(None)
    left = {skeleton.table}
    if head:
        left |= {skeleton.aliases.get(name, name) for name in (head, skeleton.table_name)}
    names = [name for name in skeleton.outside if name not in left]
    arena = Arena(sum(padded(torch.Size(skeleton.shapes[name]).numel() * skeleton.dtype.itemsize) for name in names))
    tensors = {name: arena.take(skeleton.shapes[name], skeleton.dtype, skeleton.phase(name)) for name in names}
    buffers = {name: torch.empty_like(buffer, device="cpu") for name, buffer in skeleton.buffers.items()}
    reader.read(skeleton.reads(tensors | buffers))
    for name, tensor in tensors.items():
        check_finite(skeleton, name, tensor)
        skeleton.assign(name, tensor.to(device))
    for name, buffer in buffers.items():
        skeleton.model.get_buffer(name).copy_(buffer)
    if skeleton.table:
        skeleton.assign(
            skeleton.table, torch.empty(0, skeleton.config.hidden_size, dtype=skeleton.dtype, device=device)
        )
    if head:
        skeleton.pack_head(_packed_head(skeleton, reader, head, device, precision.head))


def _packed_head(skeleton: Skeleton, reader: Reader, name: str, device: str, format: str) -> Weight:
    """The head, read and packed a few rows at a time: it is never whole in memory."""
    rows, columns = skeleton.shapes[name]
    arena = Arena(FORMATS[format].bytes(rows, columns, skeleton.dtype.itemsize), device)
    weight = take_weight(format, arena, rows, columns, skeleton.dtype)
    info = skeleton.pieces[skeleton.aliases.get(name, name)][0].info
    size = info.bytes // rows
    buffer = torch.empty(READ_ROWS, columns, dtype=skeleton.dtype)
    here = (0, 0)

    def read(begin: int, end: int, _: Scratch) -> Tensor:
        nonlocal here
        if end > here[1]:
            here = begin, min(begin + READ_ROWS, rows)
            part = replace(
                info, shape=(here[1] - begin, columns), begin=info.begin + begin * size, end=info.begin + here[1] * size
            )
            reader.read({part: buffer[: here[1] - begin]})
            check_finite(skeleton, name, buffer[: here[1] - begin])
        return buffer[begin - here[0] : end - here[0]].to(device)

    weight.fill(read, Scratch(columns, skeleton.dtype.itemsize, device))
    return weight


def block_magnitude(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """(F,) or (E, F), float32, of a block's dense weights."""
    matrices = [name for name in block.rows if name != block.down and dense[name].ndim > 1 + bool(block.routed)]
    return magnitude([part for name in matrices for part in block.rows[name].split(dense[name])])
