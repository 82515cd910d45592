"""FFN-SkipLLM at work: feed-forward blocks that a token, or a whole answer, leaves out (the rules: skip.py).

Of a block that is left out no neuron takes part: what a bias of the down projection adds stays, its weights are not
read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from ..model.architecture import ARCHITECTURES
from ..model.hooks import Residual
from ..model.skeleton import Skeleton
from ..options import FfnSkip
from ..planning.sizes import Kept
from ..pruning.ffn_skip import SkippedBlocks, most_saturated, next_to_leave
from .resident_layer import ResidentLayer


def check_skip(skeleton: Skeleton, skip: FfnSkip, prompts: int = 1, export: bool = False) -> None:
    """Raises OptionError for a model whose blocks cannot be skipped, for several prompts together, and by token for an
    export."""
    if export and not skip.by_prompt:
        raise OptionError("an export has no tokens to skip for: give --ffn-skip-mode prompt")
    if prompts > 1:
        raise OptionError(f"ffn-skip {skip.share:g} is for one prompt at a time, not for {prompts}: leave one out")
    kind = skeleton.config.model_type
    if any(len(layer.blocks) > 1 or block.routed for layer in skeleton.layers for block in layer.blocks):
        raise OptionError(f"ffn-skip needs layers of one plain feed-forward block; {kind!r} has others: leave it out")
    known = ARCHITECTURES.get(kind)
    if known is None or not known.tells_similarity(skeleton.config):
        raise OptionError(f"ffn-skip cannot tell how far a block of {kind!r} turns the hidden state: leave it out")


def can_skip(skeleton: Skeleton) -> bool:
    """Whether `check_skip` has nothing against the model."""
    try:
        check_skip(skeleton, FfnSkip(0.5))
    except OptionError:
        return False
    return True


class Saturation:
    """How far a prompt turns the state in each block that may be skipped, the mean of its tokens, as layers pass."""

    def __init__(self, skeleton: Skeleton, skip: FfnSkip) -> None:
        self._skeleton, self._skip = skeleton, skip
        self._numbers = skeleton.block_layers
        self.may = [self._numbers[block] for block in skip.skippable(len(self._numbers))]
        self._residuals: dict[int, Residual] = {}
        self._similarity: dict[int, float] = {}  # by layer

    def open(self) -> None:
        self._residuals = {i: Residual(self._skeleton.layers[i].module) for i in self.may}

    def left(self, index: int, hidden: Tensor) -> None:
        if residual := self._residuals.pop(index, None):
            self._similarity[index] = float(residual.similarity(hidden).mean())
            residual.remove()

    def close(self) -> None:
        while self._residuals:
            self._residuals.popitem()[1].remove()

    def skipped(self) -> list[int]:
        """The layers whose blocks the prompt leaves out."""
        return [self._numbers[block] for block in most_saturated(self._table(), self._skip)]

    def _table(self) -> Tensor:
        """(L,), by block; 0 where it was not looked at."""
        return torch.tensor([self._similarity.get(i, 0.0) for i in self._numbers])


class Slots(Saturation):
    """Leaves the most saturated blocks of a prompt without neurons, though which they are is known only at its end.

    There is memory for the blocks that stay, and all are of one size. The last layers have none: as such a layer
    passes, the most saturated of those that have passed gives up its own, or else the layer itself stays empty."""

    def __init__(self, skeleton: Skeleton, skip: FfnSkip, layers: Sequence[ResidentLayer]) -> None:
        """`layers`: as a plan has them (see put_back)."""
        super().__init__(skeleton, skip)
        self._layers = layers
        moves = not all(any(layers[i].kept) for i in self.may)
        for number in self.may:
            layers[number].moves = moves

    def left(self, index: int, hidden: Tensor) -> None:
        super().left(index, hidden)
        if index not in self._similarity or any(self._layers[index].kept):
            return
        passed = {self._numbers.index(i): i == index or any(self._layers[i].kept) for i in self._similarity}
        held, gone = ([block for block, there in passed.items() if there is wanted] for wanted in (True, False))
        most = self._numbers[next_to_leave(held, gone, self._table(), self._skip)]
        if most != index:
            _swap(self._skeleton, self._layers, most, index)  # the stream's end puts it into the modules


def put_back(skeleton: Skeleton, layers: Sequence[ResidentLayer], kept: Kept) -> None:
    """Move memory that an earlier prompt gave to other layers to where a plan has it, if it is as much."""
    others = [i for i, layer in enumerate(layers) if layer.kept != kept[i]]
    lack, have = ([i for i in others if bool(any(kept[i])) is wanted] for wanted in (True, False))
    if len(lack) == len(have) and all(layers[i].kept == kept[j] for i, j in zip(have, lack, strict=True)):
        for i, j in zip(lack, have, strict=True):
            _swap(skeleton, layers, i, j)


def _swap(skeleton: Skeleton, layers: Sequence[ResidentLayer], one: int, other: int) -> None:
    """Two layers swap their blocks' memory."""
    a, b = layers[one], layers[other]
    for block in skeleton.layers[one].blocks:
        for name in block.rows:
            a.tensors[name], b.tensors[name] = b.tensors[name], a.tensors[name]
    a.kept, b.kept = b.kept, a.kept
    a.kept_neurons, b.kept_neurons = b.kept_neurons, a.kept_neurons


def left_out(skip: FfnSkip, kept: Kept) -> SkippedBlocks:
    """What a prompt's answer left out, by the neurons of its blocks."""
    by_layer = tuple(float(bool(k) and not any(k)) for k in kept)
    return SkippedBlocks(skip, by_layer, sum(map(bool, kept)))
