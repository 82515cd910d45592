"""Chooses the neurons of a layer by what its forward over the prompt shows, and gathers them."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..model.hooks import ObserveNeurons
from ..model.layout import Block, ModelLayout
from ..pruning.selection import Selection, magnitude
from .gather import gather_block
from .layer_hook import LayerHook
from .resident_layer import ResidentLayer


class KeepNeurons(LayerHook):
    """After a layer: choose by its statistics as they are, and gather the kept neurons from the dense weights."""

    def __init__(self, layout: ModelLayout, layers: Sequence[ResidentLayer], selection: Selection) -> None:
        self._layout, self._layers, self._selection = layout, layers, selection

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
            gather_block(block, dense, kept_neurons, resident.precision, resident.tensors, resident.scratch)


class Pruner(KeepNeurons):
    """GRIFFIN on one prompt (or one batch, together): observes z while a layer runs, then keeps what it favours.

    `weights` (B T,), float32: what each token counts (see neuron_statistic)."""

    def __init__(
        self,
        layout: ModelLayout,
        modules: Sequence[nn.Module],
        layers: Sequence[ResidentLayer],
        selection: Selection,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(layout, layers, selection)
        self._modules, self._weights = modules, weights
        self._observers: list[ObserveNeurons] = []

    def before(self, layer: int, states: Tensor | None) -> None:
        resident, module = self._layers[layer], self._modules[layer]
        blocks = zip(self._layout.layers[layer].blocks, resident.kept, resident.statistics, strict=True)
        for block, kept, total in blocks:
            if kept < block.neurons:
                self._observers.append(ObserveNeurons(module, block.path, total.zero_(), self._weights))

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        self.close()
        super().after(layer, states, dense)

    def close(self) -> None:
        while self._observers:
            self._observers.pop().remove()


def block_magnitude(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """Product of the norms of each neuron's rows in a block's dense weights: (F,) or (E, F), float32."""
    matrices = [name for name in block.rows if name != block.down and dense[name].ndim > 1 + bool(block.routed)]
    return magnitude([part for name in matrices for part in block.rows[name].split(dense[name])])
