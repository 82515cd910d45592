"""What a run will hold in memory, row by row, before any weight is read: sizes + budget -> Plan.

Two moments can be the peak: the end of the sweep (staging and the prompt's activations, all experts in place) and the
end of the answer (the whole KV cache, no staging). Rows say at which moment they count; the peak is the larger sum.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .errors import BudgetError, OptionError, PromptError
from .packed import Scratch
from .precision import NATIVE, Precision
from .selection import Sparsity, check_sparsities
from .sizes import Kept, ModelSizes
from .skip import Skip
from .units import MIB, format_bytes

DEFAULT_SPARSITY = 0.5
STAGING_LAYERS = 2
DRIFT = 16 * MIB  # by which the next process may hold more before it starts: what is suggested allows for it
Moment = Literal["always", "prompt", "answer"]


@dataclass(frozen=True)
class Row:
    """One line of the plan. `when`: at which of the two moments it counts."""

    name: str
    bytes: int
    when: Moment = "always"
    note: str = ""


@dataclass(frozen=True)
class LayerPlan:
    """`kept` of the layer's `neurons` (of all its blocks and routed experts) stay."""

    kept: int
    neurons: int
    resident_bytes: int
    full_bytes: int


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
    skip: Skip | None = None

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
        may = [numbers[block] for block in self.skip.may(len(numbers))]
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


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    layers: tuple[LayerPlan, ...]
    kept: Kept
    precision: Precision
    budget: int
    sparsity: float
    prompt_tokens: int
    max_new_tokens: int
    full_bytes: int
    resident_bytes: int
    bytes_per_token: int
    fits_whole: bool
    steady_heap: bool
    held_layers: int
    host_bytes: int
    skip: Skip | None = None

    @property
    def peak(self) -> int:
        """Predicted peak, bytes."""
        return _peak(self.rows)

    @property
    def prunes(self) -> bool:
        return any(layer.kept < layer.neurons for layer in self.layers)

    @property
    def reads_again(self) -> bool:
        """Whether what stays is less than what a prompt passes through."""
        return self.prunes or self.precision.packs

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak, "fits": self.fits}


def make_plan(sizes: ModelSizes, request: Request) -> Plan:
    """The plan of a request, whether or not it fits (`choose_plan` refuses one that does not)."""
    kept, how = request.kept(sizes), request.precision
    layers = _layer_plans(sizes, kept, how)
    whole = _peak(_rows(sizes, replace(request, sparsity=0.0, sets=1, precision=NATIVE), sizes.kept(0)))
    rows = _rows(sizes, request, kept)
    staged = sizes.staged(kept, how)
    held = _held(request, rows, staged, len(layers))
    if held and not request.copies:
        note = f"{held} of {len(layers)} layers"
        rows = (*rows, Row("layers in RAM for the next prompt", held * staged, note=note))
    return Plan(
        rows=rows,
        layers=layers,
        kept=kept,
        precision=how,
        budget=request.budget,
        sparsity=_overall(request.sparsity, layers),
        prompt_tokens=request.prompt_tokens,
        max_new_tokens=request.max_new_tokens,
        full_bytes=sizes.full,
        resident_bytes=sizes.resident(kept, how),
        bytes_per_token=_read_by_a_token(sizes, kept, how),
        fits_whole=whole <= request.budget,
        steady_heap=_steady_heap(sizes, request),
        held_layers=held,
        host_bytes=held * staged,
        skip=request.skip,
    )


def with_kept(plan: Plan, sizes: ModelSizes, kept: Kept) -> Plan:
    """The plan, of a run that left these neurons: it may be other blocks that are empty, or now that they are known."""
    how = plan.precision
    return replace(
        plan,
        kept=kept,
        layers=_layer_plans(sizes, kept, how),
        resident_bytes=sizes.resident(kept, how),
        bytes_per_token=_read_by_a_token(sizes, kept, how),
    )


def emptied(kept: Kept, layers: Sequence[int]) -> Kept:
    """The same, these layers without any neuron."""
    return tuple((0,) * len(k) if i in layers else k for i, k in enumerate(kept))


def _layer_plans(sizes: ModelSizes, kept: Kept, how: Precision) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(
            s.count(k), s.count(s.whole), s.fixed_in(how) + s.feed_forward(k, how), s.fixed + s.feed_forward(s.whole)
        )
        for s, k in zip(sizes.layers, kept, strict=True)
    )


def _read_by_a_token(sizes: ModelSizes, kept: Kept, how: Precision) -> int:
    return sizes.resident(kept, how) - (0 if how.head else sizes.lookup)


def check_request(sizes: ModelSizes, request: Request, name: str) -> Request:
    """The request, its answer no longer than the context has room for.

    Raises PromptError for an empty prompt or one beyond the context."""
    if request.prompt_tokens < 1:
        raise PromptError("the prompt is empty: give at least one token of text")
    if request.prompt_tokens >= sizes.context:
        raise PromptError(
            f"the prompt has {request.prompt_tokens} tokens; {name} reads at most {sizes.context}, answer included"
        )
    return replace(request, max_new_tokens=min(request.max_new_tokens, sizes.context - request.prompt_tokens))


def choose_plan(sizes: ModelSizes, request: Request, sparsity: Sparsity, name: str) -> Plan:
    """The plan to run, as asked. Raises PromptError, OptionError, and BudgetError if it does not fit."""
    request = check_request(sizes, request, name)
    plan = make_plan(sizes, replace(request, sparsity=check_sparsities(sparsity)))
    if not plan.fits:
        raise BudgetError(_does_not_fit(sizes, request, plan, name))
    return plan


def smallest_sparsity(sizes: ModelSizes, request: Request) -> float | None:
    """The smallest sparsity, in hundredths, at which a request fits its budget; None if there is none."""
    hundredths = bisect_left(range(100), True, key=lambda h: make_plan(sizes, replace(request, sparsity=h / 100)).fits)
    return hundredths / 100 if hundredths < 100 else None


def _rows(sizes: ModelSizes, request: Request, kept: Kept) -> tuple[Row, ...]:
    sequences, sets, how = request.sequences, request.sets, request.precision
    layers = list(zip(sizes.layers, kept, strict=True))
    fixed = sum(layer.fixed_in(how) for layer in sizes.layers)
    experts = sum(layer.feed_forward(k, how) for layer, k in layers)
    staged = sizes.staged(kept, how)
    whole = max(layer.fixed + layer.feed_forward(layer.whole) for layer in sizes.layers)
    rows = [Row("Python and libraries", request.runtime, note="measured")]
    rows.append(Row("embeddings, final norm, head", sizes.outside_in(how), note=how.head))
    if request.export:
        rows.append(Row("one compact layer", max(layer.feed_forward(k) for layer, k in layers)))
        rows.append(Row("staging, two layers", STAGING_LAYERS * whole, "prompt"))
    else:
        rows.append(Row("attention and norms", fixed, note=how.others))
        rows.append(Row("experts (kept feed-forward)", sets * experts, note=_experts_note(sizes, request, kept)))
        if request.copies:
            rows.append(Row("two dense layers", STAGING_LAYERS * whole, "prompt"))
        elif staged:
            rows.append(Row("staging, two layers", STAGING_LAYERS * staged, "prompt"))
    if request.converts:
        rows.append(Row("conversion buffer", request.converts, "prompt"))
    if how.packs:
        rows.append(Row("rows on their way into packed weights", Scratch.bytes(sizes.widest, sizes.item), "prompt"))
    together = sequences if sets == 1 else 1
    activations = sizes.activations(request.prompt_tokens, together)
    rows.append(Row("activations of the prompt", activations, "prompt"))
    waiting = request.waiting + (sets if sets > 1 else 0) * 3 * request.prompt_tokens * sizes.hidden * sizes.item
    if waiting:
        rows.append(Row("prompts that wait for a layer", waiting, "prompt"))
    if _steady_heap(sizes, request):
        rows.append(Row("holes in the heap", max(activations * 3 // 2, 48 * MIB), "prompt", "measured"))
    if not request.export:
        tokens = request.prompt_tokens + request.max_new_tokens
        note = f"{request.prompt_tokens} tokens" + (f", {sequences} prompts" if sequences > 1 else "")
        rows.append(Row("KV cache of the prompt", sequences * sizes.cache(request.prompt_tokens), "prompt", note))
        rows.append(Row("KV cache with the answer", sequences * sizes.cache(tokens), "answer", f"{tokens} tokens"))
        rows.append(Row("activations of a token", sizes.activations(1, together), "answer"))
    matrices = [block.per_neuron * block.neurons for layer in sizes.layers for block in layer.blocks]
    packed = max(matrices, default=0)  # a product may copy its matrix
    rows.append(Row("margin", packed + _margin(request.runtime), note="allocator, threads, kernels' scratch"))
    return tuple(rows)


def _experts_note(sizes: ModelSizes, request: Request, kept: Kept) -> str:
    how, rest = request.precision.experts, request.precision.rest
    parts = [f"{_share(sizes, kept):.0%} of the neurons" + (f" in {how}" if how else "")]
    parts += [f"the rest in {rest}"] if rest else []
    parts += [f"{request.sets} sets"] if request.sets > 1 else []
    return ", ".join(parts)


def _held(request: Request, rows: Sequence[Row], staged: int, layers: int) -> int:
    """How many layers stay in RAM for the next prompt: as `host_memory` allows and, on the CPU, the budget."""
    if request.export or not staged:
        return 0
    room = request.host_memory if request.copies else min(request.host_memory, request.budget - _peak(rows))
    return max(0, min(room // staged, layers))


def _steady_heap(sizes: ModelSizes, request: Request) -> bool:
    """Whether the heap should keep what activations leave (see memory.steady_heap): where they are large, or many.

    Not in float32, where the products' own buffers would leave holes without end (measured)."""
    large = sizes.activations(request.prompt_tokens) >= 32 * MIB
    return sizes.item < 4 and (large or request.waiting > 0)


def _peak(rows: Sequence[Row]) -> int:
    moments: tuple[Moment, ...] = ("prompt", "answer")
    return max(sum(row.bytes for row in rows if row.when in ("always", moment)) for moment in moments)


def _margin(runtime: int) -> int:
    return 48 * MIB if runtime else 32 * MIB


def enough(plan: Plan) -> str:
    """The --device-memory to suggest for a plan, with room for what the next process may hold more."""
    return f"{-(-(plan.peak + DRIFT) // MIB)}MiB"


def _share(sizes: ModelSizes, kept: Kept) -> float:
    there = sum(layer.count(layer.whole) for layer in sizes.layers)
    return sum(layer.count(k) for layer, k in zip(sizes.layers, kept, strict=True)) / max(1, there)


def _overall(sparsity: Sparsity, layers: Sequence[LayerPlan]) -> float:
    """The one that was asked for, or what a list of them comes to."""
    if isinstance(sparsity, int | float):
        return float(sparsity)
    return round(1 - sum(layer.kept for layer in layers) / max(1, sum(layer.neurons for layer in layers)), 4)


def _does_not_fit(sizes: ModelSizes, request: Request, plan: Plan, name: str) -> str:
    error = (
        f"{name} at sparsity {plan.sparsity:g} needs {format_bytes(plan.peak)} "
        f"({plan.prompt_tokens} + {plan.max_new_tokens} tokens); the budget is {format_bytes(plan.budget)}. "
    )
    fitting = smallest_sparsity(sizes, replace(request, budget=request.budget - DRIFT))
    if fitting is not None:
        return error + f"It fits with --sparsity {fitting:g}, or with --device-memory {enough(plan)}"
    least = make_plan(sizes, replace(request, sparsity=0.99)).peak
    return (
        error + f"No sparsity fits: the least, at 0.99, is {format_bytes(least)}; give --device-memory {enough(plan)}"
    )
