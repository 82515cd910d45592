"""What a plan is made for: tokens, sparsity, precision and budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import OptionError
from ..memory.upload import Ring
from ..model.format_speeds import Speeds
from ..model.modules import PIECE
from ..options import FfnSkip, Sparsity
from ..pruning.fold import TOKENS
from ..pruning.layer_allocation import Curves, share_neurons
from ..quant.precision import NATIVE, Precision, precision
from .sizes import Kept, ModelSizes


@dataclass(frozen=True)
class Earlier:
    """A conversation whose KV cache stays from one turn to the next: of how many `tokens` of the prompt the keys and
    values are there. `resident`: the neurons and formats to go on with if they fit, since they are in memory; `ends`:
    of several cards that hold them, the layer behind the last one of each.

    `shared`: no conversation, but what all prompts of a batch begin with; it stays, and they get a copy each."""

    tokens: int = 0
    resident: tuple[Kept, Precision] | None = None
    shared: bool = False
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Card:
    """One of several devices. In bytes: `budget`, what a run may hold there; `runtime`, what the process holds there
    before any weight, and `runtime_note`, how that is known."""

    device: str
    budget: int
    runtime: int = 0
    runtime_note: str = "measured"

    def __str__(self) -> str:
        """'cuda:0', which is 'cuda' elsewhere."""
        return "cuda:0" if self.device == "cuda" else self.device


@dataclass(frozen=True)
class Request:
    """Tokens, sparsity, precision and budget of one run.

    `device`: cpu, cuda or mps. `runtime`: bytes that the process holds there before any weight (0 on MPS),
    and `runtime_note`: how that is known.
    `curves`: how much each layer needs its neurons; None: every layer drops the same share.
    `converts`: bytes of the reader's buffers where weights have another dtype or form on disk.
    `copies`: the device is not where the reader writes, so that two dense layers are held there as well; `ring`: the
    host memory that they pass through.
    `static`: tokens are decoded by recorded steps, which have memory of their own.
    `export`: layers are written out as they pass, and nothing stays resident.
    `sequences`: prompts answered together, the longest of `prompt_tokens`.
    `sets`: neuron sets kept: 1 for the batch, or one per prompt (prompts then run through each layer in turn).
    `waiting`: bytes of hidden states that other forwards hold meanwhile; `beside`: bytes that the caller holds from the
    prompt to the end.
    `host_memory`: RAM for layers between prompts (see HostTier); on the CPU it is part of the budget.
    `precision`: formats of the resident weights.
    `multiple`: kept neurons per block are rounded up to a multiple of this.
    `fold`: strength of the fold, where neurons are dropped; None: there is none. `fold_samples`: tokens of the samples
    that it is fitted to; 0: the prompt's.
    `skip`: blocks that are skipped; by prompt, they keep no neurons.
    `speeds`: of each format on this device; None: not measured.
    `fidelity`: the resident model is compared with the full one, where they differ.
    `earlier`: the earlier turns of a conversation that goes on after this one; None: the KV cache does not stay.
    `drafts`: tokens that are drafted at most before the full model verifies them; 0: none.
    `cards`: the devices, the first of which has all that lies outside the layers, and the layers too where it has room;
    `budget` is the sum of theirs. Empty: one device.
    """

    prompt_tokens: int
    max_new_tokens: int
    sparsity: Sparsity
    budget: int
    device: str = "cpu"
    runtime: int = 0
    runtime_note: str = "measured"
    curves: Curves | None = None
    converts: int = 0
    copies: bool = False
    static: bool = False
    ring: Ring | None = None
    export: bool = False
    sequences: int = 1
    sets: int = 1
    waiting: int = 0
    beside: int = 0
    host_memory: int = 0
    precision: Precision = NATIVE
    multiple: int = 1
    fold: float | None = None
    fold_samples: int = 0
    skip: FfnSkip | None = None
    speeds: Speeds | None = None
    fidelity: bool = False
    earlier: Earlier | None = None
    drafts: int = 0
    cards: tuple[Card, ...] = ()

    @property
    def where(self) -> str:
        """The names of the devices."""
        return ", ".join(map(str, self.cards)) or self.device

    def spare(self, size: int) -> "Request":
        """The request with so many bytes less in the budget of every device."""
        cards = tuple(replace(card, budget=card.budget - size) for card in self.cards)
        return replace(self, budget=self.budget - size * max(1, len(cards)), cards=cards)

    @property
    def earlier_tokens(self) -> int:
        """Tokens of the prompt whose keys and values are there."""
        return self.earlier.tokens if self.earlier else 0

    @property
    def pass_tokens(self) -> int:
        """Tokens of the prompt that are computed."""
        return self.prompt_tokens - self.earlier_tokens

    def formats(self, resident_dtype: str, rest: str) -> Precision:
        """The formats of two options. The full model, which verifies drafts, streams all but its lm_head."""
        formats = precision(resident_dtype, rest)
        return replace(formats, head="") if self.drafts else formats

    def kept(self, sizes: ModelSizes) -> Kept:
        """Kept neurons by layer and block. Which blocks the prompt empties is known only after its pass; the plan
        assumes the last skippable ones (all candidates have one size, so the bytes are the same). An export holds one
        layer at a time and empties none until it knows which."""
        layers = zip(sizes.layers, self._shared(sizes), strict=True)
        kept = tuple(
            tuple(min(k + -k % self.multiple, n) for k, n in zip(ks, layer.whole, strict=True)) for layer, ks in layers
        )
        if not self.empties:
            return kept
        last = self._may_be_empty(sizes, kept)
        return kept if self.export else emptied(kept, last)

    def fold_bytes(self, sizes: ModelSizes, kept: Kept) -> int:
        """What the fold holds at most; 0 where it has nothing to do."""
        if self.fold is None or self.precision.rest is not None or self.pass_tokens < 2:
            return 0
        tokens = self.fold_samples or self.pass_tokens * (self.sequences if self.sets == 1 else 1)
        return sizes.fold(min(tokens, TOKENS), kept, pieces=tokens > PIECE or self.fold_samples > 0)

    def measures(self, sizes: ModelSizes, kept: Kept) -> bool:
        """Whether the fidelity of what stays resident is measured."""
        return self.fidelity and (self.precision.quantized or kept != sizes.kept(0))

    @property
    def empties(self) -> bool:
        """Whether the prompt leaves blocks without neurons."""
        return self.skip is not None and self.skip.by_prompt

    def _may_be_empty(self, sizes: ModelSizes, kept: Kept) -> list[int]:
        """As many of the last skippable layers as will be skipped. Raises OptionError where their sizes differ."""
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

    @property
    def shares(self) -> bool:
        """Whether a calibration shares the sparsity over the layers."""
        return self.curves is not None and isinstance(self.sparsity, int | float)

    def _shared(self, sizes: ModelSizes) -> Kept:
        if self.curves is None or not isinstance(self.sparsity, int | float):
            return sizes.kept(self.sparsity)
        if any(len(layer.blocks) != 1 for layer in sizes.layers):
            raise OptionError("allocation 'sensitivity' needs layers of one feed-forward block; use uniform")
        neurons = [layer.blocks[0].neurons for layer in sizes.layers]
        return tuple((k,) for k in share_neurons(self.curves, neurons, self.sparsity))


def emptied(kept: Kept, layers: Sequence[int]) -> Kept:
    """Kept neurons with these layers emptied."""
    return tuple((0,) * len(k) if i in layers else k for i, k in enumerate(kept))
