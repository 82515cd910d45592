"""The fold of a layer while it passes: keeps rows of z, and makes of them what the kept down columns take over."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..model.hooks import Activations, CountedTokens
from ..model.layout import Block
from ..pruning.fold import Change, fold_tokens, joined, ridge
from ..quant.products import dense_linear
from .gather import Changes
from .layer_hook import LayerHook


class Folding:
    """Of the layer at hand, rows of z by block. `strength`: λ of pruning/fold.py; `tokens` (N,), bool: which of the
    forward at hand count."""

    def __init__(self, strength: float, tokens: Tensor) -> None:
        self._strength, self._tokens = strength, CountedTokens(tokens)
        self._activations: dict[int, Activations] = {}  # by block

    def count(self, tokens: CountedTokens) -> None:
        """These tokens of the next forward through the layer count."""
        self._tokens = tokens
        for rows in self._activations.values():
            rows.tokens = tokens

    def rows(self, number: int) -> Activations:
        """Where the rows of the block `number` go."""
        return self._activations.setdefault(number, Activations(self._tokens))

    def changes(self, block: Block, number: int, dense: Mapping[str, Tensor], kept_neurons: Tensor) -> Changes:
        """What the kept columns of the layer's block `number` take over; its rows are used up."""
        rows, down = self._activations.pop(number), dense[block.down]
        if block.routed:  # each expert by the tokens that were routed to it
            experts = enumerate(zip(down, kept_neurons, strict=True))
            return [self._change(rows.pieces(i), block, matrix, chosen) for i, (matrix, chosen) in experts]
        return [self._change(rows.pieces(), block, down, kept_neurons)]

    def _change(self, pieces: list[Tensor], block: Block, down: Tensor, chosen: Tensor) -> Change | None:
        """From rows of z (s, F), a down matrix and its kept neurons (k,); None where no token counts."""
        if not any(map(len, pieces)):
            return None
        z = joined(pieces)
        kept = z[:, chosen]
        z[:, chosen] = 0  # a product with the whole matrix is quicker than gathering columns for it
        lost = dense_linear(z, down if block.rows[block.down].axis else down.t())
        return ridge(kept, lost, self._strength)

    def clear(self) -> None:
        self._activations.clear()


class CountTokens(LayerHook):
    """On one of many forwards: says which of its tokens count for the fold."""

    def __init__(self, folding: Folding, tokens: Tensor) -> None:
        self._folding, self._tokens = folding, CountedTokens(tokens)

    def before(self, layer: int, states: Tensor | None) -> None:
        self._folding.count(self._tokens)


def sample_tokens(lengths: Sequence[int], device: str = "cpu") -> list[Tensor]:
    """Which tokens of many samples count for one fold: of each (T,), bool. See fold_tokens."""
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths], device=device)
    tokens = fold_tokens(mask).view(mask.shape)
    return [row[longest - length :] for row, length in zip(tokens, lengths, strict=True)]
