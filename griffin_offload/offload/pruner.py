"""Chooses the neurons of a layer by what its forward over the prompt shows, and gathers them."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..model.hooks import ObserveNeurons
from ..model.layout import Block, ModelLayout
from ..pruning.selection import Selection, magnitude
from .earlier_turns import TurnStatistics
from .folding import Folding
from .gather import Changes, gather_block
from .layer_hook import LayerHook
from .resident_layer import ResidentLayer


class KeepNeurons(LayerHook):
    """After a layer: choose by its statistics as they are, and gather the kept neurons from the dense weights.

    `folding`: the kept columns take over what the dropped ones gave; None: they stay as they are."""

    def __init__(
        self,
        layout: ModelLayout,
        layers: Sequence[ResidentLayer],
        selection: Selection,
        folding: Folding | None = None,
    ) -> None:
        self._layout, self._layers, self._selection, self._folding = layout, layers, selection, folding

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        resident = self._layers[layer]
        for number, block in enumerate(self._layout.layers[layer].blocks):
            kept, kept_neurons = resident.kept[number], resident.kept_neurons[number]
            if kept < block.neurons:
                weights = partial(block_magnitude, block, dense)
                chosen = self._selection.choose(resident.statistics[number], kept, layer, weights, number)
                kept_neurons.copy_(chosen)
            elif not resident.moves and (not resident.precision.kept or resident.complete):
                continue
            changes: Changes = ()
            if self._folding and 0 < kept < block.neurons:
                changes = self._folding.changes(block, number, dense, kept_neurons)
            gather_block(block, dense, kept_neurons, resident.precision, resident.tensors, resident.scratch, changes)
        if self._folding:
            self._folding.clear()


class Pruner(KeepNeurons):
    """GRIFFIN on one prompt (or one batch, together): observes z while a layer runs, then keeps what it favours.

    `weights` (B T,), float32: what each token counts (see neuron_statistic). `turn`: the prompt is one of a
    conversation."""

    def __init__(
        self,
        layout: ModelLayout,
        modules: Sequence[nn.Module],
        layers: Sequence[ResidentLayer],
        selection: Selection,
        weights: Tensor | None = None,
        folding: Folding | None = None,
        turn: TurnStatistics | None = None,
    ) -> None:
        super().__init__(layout, layers, selection, folding)
        self._modules, self._weights, self._turn = modules, weights, turn
        self._observers: list[ObserveNeurons] = []

    def before(self, layer: int, states: Tensor | None) -> None:
        resident, module = self._layers[layer], self._modules[layer]
        blocks = zip(self._layout.layers[layer].blocks, resident.kept, resident.statistics, strict=True)
        for number, (block, kept, total) in enumerate(blocks):
            if kept < block.neurons:
                total.zero_()
                first = self._turn.begin(layer, number, total) if self._turn else None
                rows = self._folding.rows(number) if self._folding else None
                observer = ObserveNeurons(module, block.path, total, self._weights, activations=rows, first=first)
                self._observers.append(observer)

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        self._detach()
        super().after(layer, states, dense)

    def _detach(self) -> None:
        while self._observers:
            self._observers.pop().remove()

    def close(self) -> None:
        self._detach()
        if self._folding:
            self._folding.clear()


def block_magnitude(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """Product of the norms of each neuron's rows in a block's dense weights: (F,) or (E, F), float32."""
    matrices = [name for name in block.rows if name != block.down and dense[name].ndim > 1 + bool(block.routed)]
    return magnitude([part for name in matrices for part in block.rows[name].split(dense[name])])
