"""Chooses the neurons of a layer by what its forward over the prompt shows, and gathers them."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..model.hooks import Activations, ObserveNeurons
from ..model.layout import Block, ModelLayout
from ..pruning.fold import Change, Fold, joined, ridge
from ..pruning.selection import Selection, magnitude
from ..quant.products import dense_linear
from .earlier_turns import TurnStatistics
from .gather import Changes, gather_block
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
            changes = self._changes(block, number, dense, kept_neurons) if 0 < kept < block.neurons else ()
            gather_block(block, dense, kept_neurons, resident.precision, resident.tensors, resident.scratch, changes)

    def _changes(self, block: Block, number: int, dense: Mapping[str, Tensor], kept_neurons: Tensor) -> Changes:
        """What the kept columns of the layer's block `number` take over."""
        return ()


class Pruner(KeepNeurons):
    """GRIFFIN on one prompt (or one batch, together): observes z while a layer runs, then keeps what it favours.

    `weights` (B T,), float32: what each token counts (see neuron_statistic). `fold`: the kept columns take over
    what the dropped ones gave the prompt; None: they stay as they are. `turn`: the
    prompt is one of a conversation."""

    def __init__(
        self,
        layout: ModelLayout,
        modules: Sequence[nn.Module],
        layers: Sequence[ResidentLayer],
        selection: Selection,
        weights: Tensor | None = None,
        fold: Fold | None = None,
        turn: TurnStatistics | None = None,
    ) -> None:
        super().__init__(layout, layers, selection)
        self._modules, self._weights, self._fold, self._turn = modules, weights, fold, turn
        self._observers: list[ObserveNeurons] = []
        self._activations: dict[int, Activations] = {}  # of the layer at hand, by block

    def before(self, layer: int, states: Tensor | None) -> None:
        resident, module = self._layers[layer], self._modules[layer]
        blocks = zip(self._layout.layers[layer].blocks, resident.kept, resident.statistics, strict=True)
        for number, (block, kept, total) in enumerate(blocks):
            if kept < block.neurons:
                if self._fold:
                    self._activations[number] = Activations(self._fold.tokens)
                total.zero_()
                first = self._turn.begin(layer, number, total) if self._turn else None
                kept_rows = self._activations.get(number)
                observer = ObserveNeurons(module, block.path, total, self._weights, activations=kept_rows, first=first)
                self._observers.append(observer)

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        self._detach()
        super().after(layer, states, dense)
        self._activations.clear()

    def _changes(self, block: Block, number: int, dense: Mapping[str, Tensor], kept_neurons: Tensor) -> Changes:
        if not self._fold:
            return ()
        rows, down = self._activations.pop(number), dense[block.down]
        if block.routed:  # each expert by the tokens that were routed to it
            experts = enumerate(zip(down, kept_neurons, strict=True))
            return [self._change(rows.pieces(i), block, matrix, chosen) for i, (matrix, chosen) in experts]
        return [self._change(rows.pieces(), block, down, kept_neurons)]

    def _change(self, pieces: list[Tensor], block: Block, down: Tensor, chosen: Tensor) -> Change | None:
        """From rows of z (s, F), a down matrix and its kept neurons (k,); None where no token counts."""
        assert self._fold
        if not any(map(len, pieces)):
            return None
        z = joined(pieces)
        kept = z[:, chosen]
        z[:, chosen] = 0  # a product with the whole matrix is quicker than gathering columns for it
        lost = dense_linear(z, down if block.rows[block.down].axis else down.t())
        return ridge(kept, lost, self._fold.strength)

    def _detach(self) -> None:
        while self._observers:
            self._observers.pop().remove()

    def close(self) -> None:
        self._detach()
        self._activations.clear()


def block_magnitude(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """Product of the norms of each neuron's rows in a block's dense weights: (F,) or (E, F), float32."""
    matrices = [name for name in block.rows if name != block.down and dense[name].ndim > 1 + bool(block.routed)]
    return magnitude([part for name in matrices for part in block.rows[name].split(dense[name])])
