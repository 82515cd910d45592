"""The sweep: one pass over the layers, which reads each once and leaves its kept_neurons behind.

For every decoder layer, in order: wait until it is read ► forward ► statistic ► select ► materialise ► release.
This is the only place that knows the order.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from ..model.hooks import ObserveNeurons
from ..model.layout import Block
from ..model.skeleton import Skeleton
from ..pruning.selection import Selection, magnitude
from .gather import materialize
from .layer_stream import LayerStream
from .resident_layer import ResidentLayer


class Pruner:
    """Chooses and gathers the kept_neurons of one prompt (or of one batch, together), layer by layer.

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
        """After it: choose, and bring the kept_neurons from the dense weights to where they stay."""
        self.stop()
        self.keep(index, dense)

    def keep(self, index: int, dense: Mapping[str, Tensor]) -> None:
        """Choose by the statistics as they are, and gather."""
        layer, resident = self._skeleton.layers[index], self._layers[index]
        for place, (block, kept, total, kept_neurons) in enumerate(
            zip(layer.blocks, resident.kept, resident.statistics, resident.kept_neurons, strict=True)
        ):
            if kept < block.neurons:
                weights = partial(block_magnitude, block, dense)
                kept_neurons.copy_(self._selection.choose(total, kept, index, weights, place))
            elif not resident.moves and (not resident.precision.kept or resident.complete):
                continue
            for name in block.rows:
                how, out = resident.precision, resident.tensors[name]
                materialize(block, name, dense[name], kept_neurons, how, out, resident.scratch)

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

    def __init__(self, stream: LayerStream, pruner: Pruner, slots: Slots | None = None) -> None:
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


def block_magnitude(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """(F,) or (E, F), float32, of a block's dense weights."""
    matrices = [name for name in block.rows if name != block.down and dense[name].ndim > 1 + bool(block.routed)]
    return magnitude([part for name in matrices for part in block.rows[name].split(dense[name])])
