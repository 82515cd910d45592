"""What a run will hold in memory, row by row, before any weight is read: sizes + budget -> Plan.

Two moments can be the peak: the end of the sweep (staging and the prompt's activations, all experts in place) and the
end of the answer (the whole KV cache, no staging). Rows say at which moment they count; the peak is the larger sum.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .cache import capacity
from .errors import BudgetError, PromptError
from .selection import check_sparsity, kept_neurons
from .statistic import CHUNK
from .units import MIB, format_bytes
from .weights.arena import padded

DEFAULT_SPARSITY = 0.5
STAGING_LAYERS = 2
DRIFT = 16 * MIB  # by which the next process may hold more before it starts: what is suggested allows for it
Moment = Literal["always", "prompt", "answer"]


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of a decoder layer: `fixed` (attention, norms, biases that stay) and, per neuron, of each tensor."""

    fixed: int
    neurons: int
    per_neuron: tuple[int, ...]

    def feed_forward(self, kept: int) -> int:
        return sum(padded(kept * count) for count in self.per_neuron)


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model in the dtype it runs in (`item` bytes an element), and what its working memory depends on.

    `outside`: embeddings, final norm, head. `lookup`: the part of it that one token does not read (an untied
    embedding table). `cache_per_token`: bytes of keys and values by layer; `windows`: how many tokens it keeps.
    """

    outside: int
    lookup: int
    layers: tuple[LayerSizes, ...]
    item: int
    hidden: int
    vocabulary: int
    heads: int
    cache_per_token: tuple[int, ...]
    windows: tuple[int | None, ...]
    context: int

    def kept(self, sparsity: float) -> tuple[int, ...]:
        return tuple(kept_neurons(layer.neurons, sparsity) for layer in self.layers)

    def resident(self, kept: tuple[int, ...]) -> int:
        layers = zip(self.layers, kept, strict=True)
        return self.outside + sum(layer.fixed + layer.feed_forward(k) for layer, k in layers)

    def steady_heap(self, tokens: int) -> bool:
        """Whether the heap should keep what activations leave (see memory.steady_heap): where they are large.

        Not in float32, where the products' own buffers would leave holes without end (measured)."""
        return self.item < 4 and self.activations(tokens) >= 32 * MIB

    @property
    def full(self) -> int:
        return self.resident(self.kept(0))

    def cache(self, tokens: int) -> int:
        """Bytes of the KV cache that holds `tokens` tokens."""
        rows = zip(self.cache_per_token, self.windows, strict=True)
        return sum(row * capacity(tokens, window) for row, window in rows)

    def activations(self, tokens: int) -> int:
        """An upper bound of what one layer's forward, the statistic and the head hold for `tokens` tokens."""
        neurons = max(layer.neurons for layer in self.layers)
        cache_row = max(self.cache_per_token)
        stream = 3 * self.hidden * self.item + 2 * self.hidden * 4  # residual, input, output; a norm in float32
        attention = 4 * self.heads * self.item + 3 * cache_row  # queries, rotated, output; keys and values
        feed_forward = 4 * neurons * self.item  # gate, up, act(gate), z
        statistic = 3 * min(tokens, CHUNK) * neurons * 4
        slides = any(window and tokens > window for window in self.windows)
        mask = tokens * tokens * (1 + self.item) if slides else 0  # transformers writes it out for sliding layers
        layer = tokens * (stream + max(attention, feed_forward))
        return layer + statistic + mask + 6 * self.vocabulary * 4


@dataclass(frozen=True)
class Row:
    """One line of the plan. `when`: at which of the two moments it counts."""

    name: str
    bytes: int
    when: Moment = "always"
    note: str = ""


@dataclass(frozen=True)
class LayerPlan:
    kept: int
    neurons: int
    resident_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class Request:
    """What a plan is made for. `runtime`: bytes that the process holds before any weight (0 on a device of its own).

    `copies`: the device is not where the reader writes, so that one dense layer is held there as well.
    `export`: layers are written out as they pass, and nothing stays resident.
    """

    prompt_tokens: int
    max_new_tokens: int
    sparsity: float
    budget: int
    runtime: int = 0
    converts: bool = False
    copies: bool = False
    export: bool = False


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    layers: tuple[LayerPlan, ...]
    budget: int
    sparsity: float
    prompt_tokens: int
    max_new_tokens: int
    full_bytes: int
    resident_bytes: int
    bytes_per_token: int
    fits_whole: bool
    steady_heap: bool

    @property
    def peak(self) -> int:
        """Predicted peak, bytes."""
        return _peak(self.rows)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(layer.kept for layer in self.layers)

    @property
    def prunes(self) -> bool:
        return any(layer.kept < layer.neurons for layer in self.layers)

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak, "fits": self.fits}


def make_plan(sizes: ModelSizes, request: Request) -> Plan:
    """The plan of a request, whether or not it fits (`choose_plan` refuses one that does not)."""
    kept = sizes.kept(request.sparsity)
    layers = tuple(
        LayerPlan(k, s.neurons, s.fixed + s.feed_forward(k), s.fixed + s.feed_forward(s.neurons))
        for s, k in zip(sizes.layers, kept, strict=True)
    )
    whole = _peak(_rows(sizes, replace(request, sparsity=0.0), sizes.kept(0)))
    return Plan(
        rows=_rows(sizes, request, kept),
        layers=layers,
        budget=request.budget,
        sparsity=request.sparsity,
        prompt_tokens=request.prompt_tokens,
        max_new_tokens=request.max_new_tokens,
        full_bytes=sizes.full,
        resident_bytes=sizes.resident(kept),
        bytes_per_token=sizes.resident(kept) - sizes.lookup,
        fits_whole=whole <= request.budget,
        steady_heap=sizes.steady_heap(request.prompt_tokens),
    )


def choose_plan(sizes: ModelSizes, request: Request, sparsity: float | None, name: str) -> Plan:
    """The plan to run: as asked, or, with no sparsity asked, whole where that fits and else DEFAULT_SPARSITY.

    Raises PromptError for an empty prompt or one beyond the context, BudgetError for what does not fit."""
    if request.prompt_tokens < 1:
        raise PromptError("the prompt is empty: give at least one token of text")
    if request.prompt_tokens >= sizes.context:
        raise PromptError(
            f"the prompt has {request.prompt_tokens} tokens; {name} reads at most {sizes.context}, answer included"
        )
    room = sizes.context - request.prompt_tokens
    request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
    if sparsity is None:
        whole = make_plan(sizes, replace(request, sparsity=0.0))
        if whole.fits:
            return whole
        sparsity = DEFAULT_SPARSITY
    plan = make_plan(sizes, replace(request, sparsity=check_sparsity(sparsity)))
    if not plan.fits:
        raise BudgetError(_does_not_fit(sizes, request, plan, name))
    return plan


def smallest_sparsity(sizes: ModelSizes, request: Request) -> float | None:
    """The smallest sparsity, in hundredths, at which a request fits its budget; None if there is none."""
    hundredths = bisect_left(range(100), True, key=lambda h: make_plan(sizes, replace(request, sparsity=h / 100)).fits)
    return hundredths / 100 if hundredths < 100 else None


def _rows(sizes: ModelSizes, request: Request, kept: tuple[int, ...]) -> tuple[Row, ...]:
    prunes = request.sparsity > 0
    fixed = [layer.fixed for layer in sizes.layers]
    experts = [layer.feed_forward(k) for layer, k in zip(sizes.layers, kept, strict=True)]
    dense = max(layer.feed_forward(layer.neurons) for layer in sizes.layers)
    whole = max(f + layer.feed_forward(layer.neurons) for f, layer in zip(fixed, sizes.layers, strict=True))
    rows = [Row("Python and libraries", request.runtime, note="measured")]
    rows.append(Row("embeddings, final norm, head", sizes.outside))
    if request.export:
        rows.append(Row("one compact layer", max(experts)))
        rows.append(Row("staging, two layers", STAGING_LAYERS * whole, "prompt"))
    else:
        rows.append(Row("attention and norms", sum(fixed)))
        rows.append(Row("experts (kept feed-forward)", sum(experts), note=f"{_share(sizes, kept):.0%} of the neurons"))
        if request.copies:
            rows.append(Row("one dense layer", whole, "prompt"))
        elif prunes:
            rows.append(Row("staging, two layers", STAGING_LAYERS * dense, "prompt"))
    if request.converts:
        rows.append(Row("conversion buffer", 8 * MIB, "prompt"))
    activations = sizes.activations(request.prompt_tokens)
    rows.append(Row("activations of the prompt", activations, "prompt"))
    if sizes.steady_heap(request.prompt_tokens):
        rows.append(Row("holes in the heap", activations // 4 + 48 * MIB, "prompt", "measured"))
    if not request.export:
        tokens = request.prompt_tokens + request.max_new_tokens
        note = f"{request.prompt_tokens} tokens"
        rows.append(Row("KV cache of the prompt", sizes.cache(request.prompt_tokens), "prompt", note))
        rows.append(Row("KV cache with the answer", sizes.cache(tokens), "answer", f"{tokens} tokens"))
        rows.append(Row("activations of a token", sizes.activations(1), "answer"))
    packed = max(max(layer.per_neuron) * layer.neurons for layer in sizes.layers)  # a product may copy its matrix
    rows.append(Row("margin", packed + _margin(request.runtime), note="allocator, threads, kernels' scratch"))
    return tuple(rows)


def _peak(rows: tuple[Row, ...]) -> int:
    moments: tuple[Moment, ...] = ("prompt", "answer")
    return max(sum(row.bytes for row in rows if row.when in ("always", moment)) for moment in moments)


def _margin(runtime: int) -> int:
    return 48 * MIB if runtime else 32 * MIB


def _enough(plan: Plan) -> str:
    return f"{-(-(plan.peak + DRIFT) // MIB)}MiB"


def _share(sizes: ModelSizes, kept: tuple[int, ...]) -> float:
    return sum(kept) / sum(layer.neurons for layer in sizes.layers)


def _does_not_fit(sizes: ModelSizes, request: Request, plan: Plan, name: str) -> str:
    error = (
        f"{name} at sparsity {plan.sparsity:g} needs {format_bytes(plan.peak)} "
        f"({plan.prompt_tokens} + {plan.max_new_tokens} tokens); the budget is {format_bytes(plan.budget)}. "
    )
    fitting = smallest_sparsity(sizes, replace(request, budget=request.budget - DRIFT))
    if fitting is not None:
        return error + f"It fits with --sparsity {fitting:g}, or with --device-memory {_enough(plan)}"
    least = make_plan(sizes, replace(request, sparsity=0.99)).peak
    return (
        error + f"No sparsity fits: the least, at 0.99, is {format_bytes(least)}; give --device-memory {_enough(plan)}"
    )
