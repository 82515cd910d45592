"""What a plan is made for: tokens, sparsity, precision and budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import OptionError
from ..options import FfnSkip, Sparsity
from ..quant.precision import NATIVE, Precision
from .sizes import Kept, ModelSizes


@dataclass(frozen=True)
class Request:
    """What a plan is made for. `runtime`: bytes that the process holds before any weight (0 on a device of its own).

    `share`: how one sparsity is shared over the layers; default: each layer drops the same part.
    `converts`: bytes of the reader's buffers where weights have another dtype or form on disk.
    `copies`: the device is not where the reader writes, so that two dense layers are held there as well.
    `export`: layers are written out as they pass, and nothing stays resident.
    `sequences`: prompts answered together, the longest of `prompt_tokens`; `sets`: expert sets that stay, one of them
    or one for each prompt, which then pass a layer one after the other. `waiting`: bytes that other forwards hold.
    `host_memory`: RAM for layers between prompts (see HostTier); on the CPU it is part of the budget.
    `precision`: what stays, in which format.
    `multiple`: of which every block's kept neurons are one, rounded up (or all of them).
    `skip`: blocks that are left out; by prompt, they keep no neurons.
    """

    prompt_tokens: int
    max_new_tokens: int
    sparsity: Sparsity
    budget: int
    runtime: int = 0
    share: Callable[[Sequence[int], float], tuple[int, ...]] | None = None
    converts: int = 0
    copies: bool = False
    export: bool = False
    sequences: int = 1
    sets: int = 1
    waiting: int = 0
    host_memory: int = 0
    precision: Precision = NATIVE
    multiple: int = 1
    skip: FfnSkip | None = None

    def kept(self, sizes: ModelSizes) -> Kept:
        """Neurons that stay. Of the blocks that a prompt will leave out, which nobody knows yet, the last ones that may
        be are without any; an export holds one at a time, and leaves out none until it knows which."""
        layers = zip(sizes.layers, self._shared(sizes), strict=True)
        kept = tuple(
            tuple(min(k + -k % self.multiple, n) for k, n in zip(ks, layer.whole, strict=True)) for layer, ks in layers
        )
        if not self.empties:
            return kept
        last = self._may_be_empty(sizes, kept)
        return kept if self.export else emptied(kept, last)

    @property
    def empties(self) -> bool:
        """Whether the prompt leaves blocks without neurons."""
        return self.skip is not None and self.skip.by_prompt

    def _may_be_empty(self, sizes: ModelSizes, kept: Kept) -> list[int]:
        """As many layers as will be left out. Raises OptionError where their memory does not fit one another."""
        assert self.skip
        if self.precision.rest is not None:
            raise OptionError(
                f"ffn-skip by prompt leaves blocks without neurons, rest {self.precision.rest} keeps all: leave one out"
            )
        numbers = [i for i, layer in enumerate(sizes.layers) if layer.blocks]
        may = [numbers[block] for block in self.skip.skippable(len(numbers))]
        if len({(sizes.layers[i].blocks, kept[i]) for i in may}) > 1:
            raise OptionError(
                "ffn-skip by prompt needs as many neurons in every layer that may be skipped: "
                "give one sparsity and allocation uniform"
            )
        count = self.skip.count(len(numbers))
        return may[len(may) - count :]

    def _shared(self, sizes: ModelSizes) -> Kept:
        if self.share is None or not isinstance(self.sparsity, int | float):
            return sizes.kept(self.sparsity)
        if any(len(layer.blocks) != 1 for layer in sizes.layers):
            raise OptionError("allocation 'sensitivity' needs layers of one feed-forward block; use uniform")
        return tuple((k,) for k in self.share([layer.blocks[0].neurons for layer in sizes.layers], self.sparsity))


def emptied(kept: Kept, layers: Sequence[int]) -> Kept:
    """The same, these layers without any neuron."""
    return tuple((0,) * len(k) if i in layers else k for i, k in enumerate(kept))
