"""FFN-SkipLLM by prompt (the rules: pruning/ffn_skip.py): blocks that a whole answer skips keep no neurons.

A skipped block adds only its down projection's bias."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from ..model.architecture import ARCHITECTURES
from ..model.hooks import Residual
from ..model.layout import ModelLayout
from ..model.skeleton import Skeleton
from ..options import FfnSkip
from ..planning.sizes import Kept
from ..pruning.ffn_skip import SkippedBlocks, most_saturated, next_to_leave
from .layer_hook import LayerHook
from .resident_layer import ResidentLayer


def check_skip(layout: ModelLayout, skip: FfnSkip, prompts: int = 1, export: bool = False, cards: int = 0) -> None:
    """Raises OptionError for a model whose blocks cannot be skipped, for several prompts together, by token for an
    export, and by prompt where the layers may be on several `cards`."""
    if cards and skip.by_prompt:
        raise OptionError(
            f"ffn-skip by prompt moves neurons' memory from layer to layer, which {cards} devices do not share: "
            "give --ffn-skip-mode token, or one device"
        )
    if export and not skip.by_prompt:
        raise OptionError("an export has no tokens to skip for: give --ffn-skip-mode prompt")
    if prompts > 1:
        raise OptionError(f"ffn-skip {skip.share:g} is for one prompt at a time, not for {prompts}: leave one out")
    kind = layout.config.model_type
    if any(len(layer.blocks) > 1 or block.routed for layer in layout.layers for block in layer.blocks):
        raise OptionError(f"ffn-skip needs layers of one plain feed-forward block; {kind!r} has others: leave it out")
    known = ARCHITECTURES.get(kind)
    if known is None or not known.tells_similarity(layout.config):
        raise OptionError(f"ffn-skip cannot tell how much a block of {kind!r} changes the hidden state: leave it out")


def can_skip(layout: ModelLayout) -> bool:
    """Whether `check_skip` has nothing against the model."""
    try:
        check_skip(layout, FfnSkip(0.5))
    except OptionError:
        return False
    return True


class Saturation(LayerHook):
    """Measures how far a prompt turns the states in each skippable block: the mean cosine of its tokens."""

    def __init__(self, skeleton: Skeleton, skip: FfnSkip) -> None:
        self._modules, self._skip = skeleton.modules, skip
        self._block_layers = skeleton.layout.block_layers
        self.skippable = [self._block_layers[block] for block in skip.skippable(len(self._block_layers))]
        self._residual: Residual | None = None
        self._similarity: dict[int, float] = {}  # by layer

    def before(self, layer: int, states: Tensor | None) -> None:
        if layer in self.skippable:
            self._residual = Residual(self._modules[layer])

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        if self._residual:
            assert states is not None
            self._similarity[layer] = float(self._residual.similarity(states).mean())
            self.close()

    def close(self) -> None:
        if self._residual:
            self._residual.remove()
            self._residual = None

    def skipped(self) -> list[int]:
        """The layers whose blocks the prompt leaves out."""
        return [self._block_layers[block] for block in most_saturated(self._table(), self._skip)]

    def _table(self) -> Tensor:
        """(L,), by block; 0 where it was not measured."""
        return torch.tensor([self._similarity.get(layer, 0.0) for layer in self._block_layers])


class EmptyBlocks(Saturation):
    """Leaves a prompt's most saturated blocks without neurons, though which they are is known only at its end.

    There is memory for the blocks that stay, and all are of one size. The last layers have none: as such a layer
    passes, the most saturated of those that have passed gives up its own, or else the layer itself stays empty."""

    def __init__(self, skeleton: Skeleton, skip: FfnSkip, layers: Sequence[ResidentLayer]) -> None:
        """`layers`: as a plan has them (see put_back)."""
        super().__init__(skeleton, skip)
        self._layout, self._layers = skeleton.layout, layers
        moves = not all(any(layers[i].kept) for i in self.skippable)
        for number in self.skippable:
            layers[number].moves = moves

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        super().after(layer, states, dense)
        if layer not in self._similarity or any(self._layers[layer].kept):
            return
        passed = {self._block_layers.index(i): i == layer or any(self._layers[i].kept) for i in self._similarity}
        held, gone = ([block for block, there in passed.items() if there is wanted] for wanted in (True, False))
        most = self._block_layers[next_to_leave(held, gone, self._table(), self._skip)]
        if most != layer:
            _swap(self._layout, self._layers, most, layer)  # the stream's end puts it into the modules


def put_back(layout: ModelLayout, layers: Sequence[ResidentLayer], kept: Kept) -> None:
    """Move memory that an earlier prompt gave to other layers to where a plan has it, if it is as much."""
    others = [i for i, layer in enumerate(layers) if layer.kept != kept[i]]
    lack, have = ([i for i in others if bool(any(kept[i])) is wanted] for wanted in (True, False))
    if len(lack) == len(have) and all(layers[i].kept == kept[j] for i, j in zip(have, lack, strict=True)):
        for i, j in zip(lack, have, strict=True):
            _swap(layout, layers, i, j)


def _swap(layout: ModelLayout, layers: Sequence[ResidentLayer], one: int, other: int) -> None:
    """Two layers swap their blocks' memory."""
    a, b = layers[one], layers[other]
    for block in layout.layers[one].blocks:
        for name in block.rows:
            a.tensors[name], b.tensors[name] = b.tensors[name], a.tensors[name]
    a.kept, b.kept = b.kept, a.kept
    a.kept_neurons, b.kept_neurons = b.kept_neurons, a.kept_neurons


def emptied_blocks(skip: FfnSkip, kept: Kept) -> SkippedBlocks:
    """What a prompt's answer skipped, by the neurons that its blocks kept."""
    by_layer = tuple(float(bool(k) and not any(k)) for k in kept)
    return SkippedBlocks(skip, by_layer, sum(map(bool, kept)))
