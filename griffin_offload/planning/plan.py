"""A request -> a plan of what the run will hold in memory, before any weight is read; or what would fit instead."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import BudgetError, ContextError, PromptError
from ..options import FfnSkip, Sparsity
from ..pruning.fidelity import FEWEST
from ..pruning.fold import held_out
from ..pruning.selection import check_sparsities
from ..quant.precision import NATIVE, Precision
from ..units import MIB, format_bytes
from .cards import CardPlan, least_budget, placed, summed
from .fidelity import tokens_again
from .pace import read_by_a_token, tokens_per_s
from .request import Request
from .rows import Row, held_layers, needs_steady_heap, peak_bytes, plan_rows
from .sizes import Kept, ModelSizes

DEFAULT_SPARSITY = 0.5
DRIFT = 16 * MIB  # start-up memory varies by this much between processes; added to the budget that we suggest


@dataclass(frozen=True)
class LayerPlan:
    """Neurons of a layer, over all its blocks and routed experts, and its bytes."""

    kept: int
    neurons: int
    resident_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will hold; all sizes in bytes. `kept`: neurons by layer and block; `held_layers`: layers that stay in
    RAM for the next prompt, in `host_bytes`; `steady_heap`: whether the heap keeps what activations free;
    `fold`: strength of the fold, None where there is none, or `no_room_to_fold`; `tokens_per_s`: expected in decoding,
    None where this device's speeds were not measured; `read_again`: tokens of the prompt that measure the fidelity, 0:
    it is not measured; `calibrated`: the layers share the sparsity as a calibration says; `why_rest`: why the neurons
    that are not kept are held in fewer bits, or are dropped; `continues`: the KV cache stays for the next turn of a
    conversation; `earlier_tokens`: tokens of the prompt whose keys and values are there from earlier turns, or
    (`shares`) from a pass over what all prompts of the batch begin with; `drafts`:
    tokens that are drafted at most before the full model verifies them, 0: none; `streamed_bytes`: what a pass of the
    full model brings to the device again; `cards`: of several devices, what each of them holds, and `rows`, `budget`
    and `peak` are of all together; `enough_on_each`: bytes that would be enough on every card, 0: these are."""

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
    fold: float | None = None
    no_room_to_fold: bool = False
    skip: FfnSkip | None = None
    tokens_per_s: float | None = None
    read_again: int = 0
    continues: bool = False
    earlier_tokens: int = 0
    shares: bool = False
    calibrated: bool = False
    drafts: int = 0
    streamed_bytes: int = 0
    cards: tuple[CardPlan, ...] = ()
    enough_on_each: int = 0
    why_rest: str = field(default="", compare=False)

    @property
    def peak(self) -> int:
        """Predicted peak, bytes; on several cards the sum of theirs, which need not be at the same time."""
        return sum(card.peak for card in self.cards) if self.cards else peak_bytes(self.rows)

    @property
    def too_much(self) -> tuple[str, str]:
        """Of a plan that does not fit: what it needs, and the budget, in words; of several cards on the one without
        room."""
        for card in self.cards:
            if not card.fits:
                return f"{format_bytes(card.peak)} on {card.card}", f"{format_bytes(card.card.budget)} there"
        return format_bytes(self.peak), format_bytes(self.budget)

    @property
    def ends(self) -> tuple[int, ...]:
        """Of several cards the layer behind the last one of each."""
        return tuple(card.end for card in self.cards)

    @property
    def where(self) -> str:
        """The names of several cards; '' for one device."""
        return ", ".join(str(card.card) for card in self.cards)

    @property
    def peaks(self) -> dict[str, int]:
        """Of several cards the predicted peak on each, by its name here."""
        return {card.card.device: card.peak for card in self.cards}

    @property
    def devices(self) -> tuple[str, ...]:
        """Where each layer is; empty for one device."""
        return tuple(card.card.device for card in self.cards for _ in range(card.begin, card.end))

    @property
    def host_peak(self) -> int:
        """Predicted peak of RAM beside a device with memory of its own, bytes: layers, and buffers to read them."""
        return sum(row.bytes for row in self.rows if row.when == "host")

    @property
    def pass_tokens(self) -> int:
        """Tokens of the prompt that are computed."""
        return self.prompt_tokens - self.earlier_tokens

    @property
    def repeats(self) -> bool:
        """Whether the prompt was answered before, and all of it is kept."""
        return self.continues and not self.pass_tokens

    @property
    def prunes(self) -> bool:
        return any(layer.kept < layer.neurons for layer in self.layers)

    @property
    def reads_again(self) -> bool:
        """Whether a prompt passes through more than what stays resident."""
        return self.prunes or self.precision.quantized

    @property
    def fits(self) -> bool:
        return all(card.fits for card in self.cards) if self.cards else self.peak <= self.budget

    @property
    def rest(self) -> str | None:
        """What became of the neurons that are not kept: 'int8', 'int4' or 'drop'; None where all are kept."""
        return (self.precision.rest or "drop") if self.prunes else None

    @property
    def rest_and_why(self) -> str:
        """'in int4: fits the budget', which goes on after "the rest"; empty where all neurons are kept."""
        if self.rest is None:
            return ""
        taken = "dropped" if self.rest == "drop" else f"in {self.rest}"
        return f"{taken}: {self.why_rest}" if self.why_rest else taken

    @property
    def fold_in_words(self) -> str:
        """What the fold does; empty where there is none."""
        if self.no_room_to_fold:
            return "none: the budget has no room for it"
        return f"the kept neurons take over what the dropped ones gave, strength {self.fold:g}" if self.fold else ""

    def rest_to_json(self) -> dict[str, Any] | None:
        return None if self.rest is None else {"taken": self.rest, "why": self.why_rest}

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name != "why_rest"}
        own |= {"precision": self.precision.to_json(), "rest": self.rest_to_json()}
        own["cards"] = [card.to_json() for card in self.cards]
        del own["enough_on_each"]
        return {**own, "peak_bytes": self.peak, "fits": self.fits}


def make_plan(sizes: ModelSizes, request: Request) -> Plan:
    """The plan of a request, whether or not it fits (`choose_plan` refuses one that does not)."""
    kept, precision = request.kept(sizes), request.precision
    layers = _layer_plans(sizes, kept, precision)
    whole = _held(sizes, replace(request, sparsity=0.0, sets=1, precision=NATIVE), sizes.kept(0))
    held_there = _held(sizes, request, kept)
    folds = request.fold_bytes(sizes, kept) > 0
    for spared in ({"fidelity": False}, {"fold": None}):  # an answer is worth more than either
        if not held_there.fits:
            request = replace(request, **spared)  # type: ignore[arg-type]
            held_there = _held(sizes, request, kept)
    rows = held_there.rows
    staged = sizes.staged(kept, precision)
    held = held_layers(request, rows, staged, len(layers))
    if held:
        row = Row("layers in RAM for the next prompt", held * staged, "host" if request.copies else "always")
        rows = (*rows, replace(row, note=f"{held} of {len(layers)} layers"))
    return Plan(
        rows=rows,
        layers=layers,
        kept=kept,
        precision=precision,
        budget=request.budget,
        sparsity=_overall(request.sparsity, layers),
        prompt_tokens=request.prompt_tokens,
        max_new_tokens=request.max_new_tokens,
        full_bytes=sizes.full,
        resident_bytes=sizes.resident(kept, precision),
        bytes_per_token=sum(read_by_a_token(sizes, kept, precision).values()),
        fits_whole=whole.fits,
        steady_heap=needs_steady_heap(sizes, request),
        held_layers=held,
        host_bytes=held * staged,
        fold=request.fold if folds else None,
        no_room_to_fold=folds and request.fold is None,
        skip=request.skip,
        tokens_per_s=tokens_per_s(sizes, request, kept),
        read_again=_read_again(sizes, request, kept) if request.measures(sizes, kept) else 0,
        continues=request.earlier is not None and not request.earlier.shared,
        shares=request.earlier is not None and request.earlier.shared,
        earlier_tokens=request.earlier_tokens,
        calibrated=request.shares and kept != sizes.kept(request.sparsity),
        drafts=request.drafts,
        streamed_bytes=sum(layer.staged(k, precision) for layer, k in zip(sizes.layers, kept, strict=True)),
        cards=held_there.cards,
        enough_on_each=least_budget(sizes, request, kept) if request.cards and not held_there.fits else 0,
    )


@dataclass(frozen=True)
class _Held:
    """The rows of a request's plan, and those of each card."""

    rows: tuple[Row, ...]
    cards: tuple[CardPlan, ...]
    fits: bool


def _held(sizes: ModelSizes, request: Request, kept: Kept) -> _Held:
    if cards := placed(sizes, request, kept):
        return _Held(summed(cards), cards, all(card.fits for card in cards))
    rows = plan_rows(sizes, request, kept)
    return _Held(rows, (), peak_bytes(rows) <= request.budget)


def _read_again(sizes: ModelSizes, request: Request, kept: Kept) -> int:
    """How many tokens the fidelity is measured on: where neurons are folded, those that the fold was not fitted to."""
    count = tokens_again(sizes, kept, request.pass_tokens)
    if not request.fold_bytes(sizes, kept):
        return count
    return min(count, max(FEWEST, held_out(request.pass_tokens)))


def with_kept(plan: Plan, sizes: ModelSizes, kept: Kept) -> Plan:
    """The plan, corrected to the neurons that were actually kept."""
    precision = plan.precision
    return replace(
        plan,
        kept=kept,
        layers=_layer_plans(sizes, kept, precision),
        resident_bytes=sizes.resident(kept, precision),
        bytes_per_token=sum(read_by_a_token(sizes, kept, precision).values()),
    )


def _layer_plans(sizes: ModelSizes, kept: Kept, precision: Precision) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(
            s.count(k),
            s.count(s.whole),
            s.fixed_in(precision) + s.feed_forward(k, precision),
            s.fixed + s.feed_forward(s.whole),
        )
        for s, k in zip(sizes.layers, kept, strict=True)
    )


def check_request(sizes: ModelSizes, request: Request, name: str) -> Request:
    """The request, its answer no longer than the context has room for.

    Raises PromptError for an empty prompt, ContextError for one beyond the context."""
    if request.prompt_tokens < 1:
        raise PromptError("the prompt is empty: give at least one token of text")
    if request.prompt_tokens >= sizes.context:
        most = f"{sizes.context}{' (--context)' if sizes.bounded else ''}"
        raise ContextError(
            f"the prompt has {request.prompt_tokens} tokens; {name} reads at most {most}, answer included"
        )
    return replace(request, max_new_tokens=min(request.max_new_tokens, sizes.context - request.prompt_tokens))


def choose_plan(sizes: ModelSizes, request: Request, sparsity: Sparsity, name: str) -> Plan:
    """The plan to run, as asked. Raises PromptError, OptionError, and BudgetError if it does not fit."""
    request = check_request(sizes, request, name)
    plan = make_plan(sizes, replace(request, sparsity=check_sparsities(sparsity)))
    if not plan.fits:
        raise BudgetError(does_not_fit(sizes, plan, name, {"": [request]}), plan.peak)
    return plan


def smallest_sparsity(sizes: ModelSizes, request: Request) -> float | None:
    """The smallest sparsity, in hundredths, at which a request fits its budget; None if there is none."""
    hundredths = bisect_left(range(100), True, key=lambda h: make_plan(sizes, replace(request, sparsity=h / 100)).fits)
    return hundredths / 100 if hundredths < 100 else None


def enough(plan: Plan) -> str:
    """The --device-memory to suggest for a plan: of several cards that of each."""
    needed = (plan.enough_on_each or max(card.peak for card in plan.cards)) if plan.cards else plan.peak
    return f"{-(-(needed + DRIFT) // MIB)}MiB"


def _overall(sparsity: Sparsity, layers: Sequence[LayerPlan]) -> float:
    """The sparsity that was asked for, or the overall one of a list."""
    if isinstance(sparsity, int | float):
        return float(sparsity)
    return round(1 - sum(layer.kept for layer in layers) / max(1, sum(layer.neurons for layer in layers)), 4)


def does_not_fit(
    sizes: ModelSizes, plan: Plan, name: str, ways: Mapping[str, Sequence[Request]], or_with: str = ""
) -> str:
    """What is wrong with a plan, and what would fit: the smallest sparsity for the first of the `ways` to run the model
    (how to say it -> requests that are as good) that has one; `or_with`: another option that would do."""
    needed, budget = plan.too_much
    error = (
        f"{name} at sparsity {plan.sparsity:g} needs {needed} "
        f"({plan.prompt_tokens} + {plan.max_new_tokens} tokens); the budget is {budget}. "
    )
    found = ((said, room_at(sizes, requests)) for said, requests in ways.items())
    best = next((f"--sparsity {sparsity:g}{said}" for said, sparsity in found if sparsity is not None), "")
    fitting = [option for option in (best, or_with) if option]
    if fitting:
        return error + f"It fits with {', with '.join(fitting)}, or with --device-memory {enough(plan)}"
    requests = [request for each in ways.values() for request in each]
    least = min((make_plan(sizes, replace(request, sparsity=0.99)) for request in requests), key=lambda p: p.peak)
    needed, _ = least.too_much
    return error + f"No sparsity fits: the least, at 0.99, is {needed}; give --device-memory {enough(plan)}"


def room_at(sizes: ModelSizes, requests: Iterable[Request]) -> float | None:
    """The smallest sparsity at which one of the requests fits its budget, with a little to spare; None: at none."""
    each = (smallest_sparsity(sizes, request.spare(DRIFT)) for request in requests)
    return min((sparsity for sparsity in each if sparsity is not None), default=None)
