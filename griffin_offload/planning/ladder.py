"""What is kept, and in which precision, where nobody says: the best rung of a ladder that fits.

Quality comes first, speed decides between equals. So a rung that is slower and no better than another that fits is
never taken."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..errors import BudgetError
from ..model.format_speeds import speeds_of
from ..options import AUTO, RESIDENT_DTYPES, Pruning
from ..pruning.selection import check_sparsities
from ..quant.precision import Precision
from .plan import Plan, check_request, does_not_fit, enough, make_plan, room_at
from .request import Request
from .sizes import Kept, ModelSizes


@dataclass(frozen=True)
class Way:
    """One way to keep a model."""

    resident_dtype: str
    sparsity: float
    rest: str

    def asked(self, request: Request) -> Request:
        """The request, to keep the model this way."""
        return replace(request, sparsity=self.sparsity, precision=request.formats(self.resident_dtype, self.rest))

    def __str__(self) -> str:
        """'int8', 'int4, 50 % dropped', 'int8, 75 % in int4'."""
        if not self.sparsity:
            return self.resident_dtype
        rest = "dropped" if self.rest == "drop" else f"in {self.rest}"
        return f"{self.resident_dtype}, {self.sparsity:.0%} {rest}"


@dataclass(frozen=True)
class Rung(Way):
    """`divergence`: KL of the next token's distribution from the whole model's, in nats: the larger of two small
    models' on WikiText-2 (docs/results.md). Larger models lose less."""

    divergence: float


LADDER = (
    Rung("bfloat16", 0.0, "drop", 0.0),
    Rung("bfloat16", 0.5, "int8", 0.0014),
    Rung("int8", 0.0, "drop", 0.0059),
    Rung("int8", 0.5, "int4", 0.0192),
    Rung("int8", 0.75, "int4", 0.0297),
    Rung("int8", 0.9, "int4", 0.0411),
    Rung("int4", 0.0, "drop", 0.154),
    Rung("int4", 0.1, "drop", 0.213),
    Rung("int4", 0.25, "drop", 0.367),
    Rung("int4", 0.5, "drop", 0.852),
    Rung("int4", 0.75, "drop", 2.92),
)
BFLOAT16 = (  # the ladder for one who will have nothing else of the kept neurons and attention
    *LADDER[:2],
    Rung("bfloat16", 0.5, "int4", 0.017),
    Rung("bfloat16", 0.75, "int4", 0.026),
    Rung("bfloat16", 0.5, "drop", 0.815),
)
REST = "int4"  # what `--rest auto` beside a sparsity keeps the other neurons in: a quarter of bfloat16's bytes
INT8_IS_FREE = 0.25  # share of dropped neurons from which on int8 costs no quality


def describe(plan: Plan) -> str:
    """What a plan keeps, as a rung says it."""
    kept, rest = plan.precision.kept or RESIDENT_DTYPES[0], plan.precision.rest or "drop"
    return str(Way(kept, plan.sparsity, rest))


def chooses_format(pruning: Pruning, plan: Plan) -> bool:
    """Whether a plan's formats were chosen for the user, and speeds had a say in it, or could have had."""
    return pruning.resident_dtype == AUTO if pruning.sparsity is not None else plan.precision.quantized


Resident = tuple[Kept, Precision] | None  # neurons and formats that are in memory, from the turn before


def best_that_fits(plans: Iterable[tuple[float, Plan]], resident: Resident = None) -> Plan | None:
    """Of (divergence, plan) the plan that fits and has the least; of equals the fastest, or the first if no speed is
    known. Before all others the one that is in memory."""
    fitting = [
        ((plan.kept, plan.precision) != resident, divergence, -(plan.tokens_per_s or 0.0), plan)
        for divergence, plan in plans
        if plan.fits
    ]
    return min(fitting, key=lambda found: found[:3], default=(False, 0.0, 0.0, None))[3]


def climb(sizes: ModelSizes, request: Request, rungs: Sequence[Rung] = LADDER) -> list[tuple[Rung, Plan]]:
    """The plan of every rung, whether or not it fits."""
    return [(rung, make_plan(sizes, rung.asked(request))) for rung in rungs]


Choose = Callable[[ModelSizes, Request, Pruning, str], Plan]


def plan_at_speed(
    choose: Choose, sizes: ModelSizes, request: Request, pruning: Pruning, name: str, dtype: torch.dtype
) -> Plan:
    """The plan that `choose` (such as `best_plan`) makes by the speeds of the formats on the request's device, which
    are measured where they have a say."""
    pruning = replace(pruning, prior=None)  # which plans do not depend on
    request = replace(request, speeds=speeds_of(sizes.full, request.device, dtype, measure=False))
    plan = choose(sizes, request, pruning, name)
    if chooses_format(pruning, plan):
        measured = speeds_of(sizes.full, request.device, dtype, measure=True)
        if measured != request.speeds:
            plan = choose(sizes, replace(request, speeds=measured), pruning, name)
    return plan


@lru_cache(maxsize=256)
def best_plan(sizes: ModelSizes, request: Request, pruning: Pruning, name: str) -> Plan:
    """The plan to run: as `pruning` asks; what it leaves open (None) from the ladder, the best rung that fits.

    Beside a sparsity, the kept neurons are in bfloat16, or with resident dtype 'auto' in the best dtype that fits; the
    other neurons, if rest is open (None or 'auto'), in int4 where that fits, or else dropped. Raises PromptError,
    OptionError, and BudgetError for what does not fit."""
    request = check_request(sizes, request, name)
    rest = None if pruning.rest == AUTO else pruning.rest
    if pruning.sparsity is not None:
        request = replace(request, sparsity=check_sparsities(pruning.sparsity))
        at = _AtSparsity(sizes, request, pruning, name)
        return at.asked(rest) if rest else at.best()
    plans = climb(sizes, request, _rungs(request, pruning.resident_dtype, rest))
    if found := best_that_fits(((rung.divergence, plan) for rung, plan in plans), _resident(request)):
        return replace(found, why_rest="as asked" if rest else "the best that fits the budget")
    rung, least = min(plans, key=lambda pair: pair[1].peak)
    needed, budget = least.too_much
    raise BudgetError(
        f"{name} needs at least {needed} ({rung}; {least.prompt_tokens} + "
        f"{least.max_new_tokens} tokens); the budget is {budget}. "
        f"Give --device-memory {enough(least)}, or fewer tokens",
        least.peak,
    )


class _AtSparsity:
    """The plans of a request at a given sparsity, in the given dtype or any, by what becomes of the other neurons."""

    def __init__(self, sizes: ModelSizes, request: Request, pruning: Pruning, name: str) -> None:
        self.sizes, self.request, self.name = sizes, request, name
        dtype = pruning.resident_dtype or RESIDENT_DTYPES[0]
        self.dtypes = RESIDENT_DTYPES if dtype == AUTO else (dtype,)

    def asked(self, rest: str) -> Plan:
        """The plan with a rest that was asked for. Raises OptionError, BudgetError."""
        *_, last = plans = self.plans(rest)
        if found := self.fitting(plans):
            return replace(found, why_rest="as asked")
        or_drop = "--rest drop" if rest != "drop" and self.fitting(self.plans("drop")) else ""
        raise BudgetError(does_not_fit(self.sizes, last, self.name, {"": self.requests(rest)}, or_drop), last.peak)

    def best(self) -> Plan:
        """The plan with the rest in int4 where that fits, or else dropped. Raises BudgetError."""
        *_, last = dropped = self.plans("drop")
        least = self.fitting(dropped)
        ways = {", the rest dropped": self.requests("drop")}
        if self.request.empties:
            why = "ffn-skip by prompt leaves blocks without neurons"
        elif not last.prunes:
            ways, why = {f", the rest in {REST}": self.requests(REST), **ways}, ""
        else:
            ways = {f", the rest in {REST}": self.requests(REST), **ways}
            plans = self.plans(REST)
            if least and (least.kept, least.precision) == _resident(self.request):
                why = "as in the turn before"
            elif found := self.fitting(plans):
                return replace(found, why_rest="fits the budget")
            else:
                why = self._too_large(min(plans, key=lambda plan: plan.peak))
        if least:
            return replace(least, why_rest=why)
        raise BudgetError(does_not_fit(self.sizes, last, self.name, ways), last.peak)

    def _too_large(self, least: Plan) -> str:
        room = room_at(self.sizes, self.requests(REST))
        hint = "" if room is None else f"; with --sparsity {room:g} it fits in {REST}"
        needed, budget = least.too_much
        return f"with it {needed} are needed, the budget is {budget}{hint}"

    def requests(self, rest: str) -> list[Request]:
        return [replace(self.request, precision=self.request.formats(dtype, rest)) for dtype in self.dtypes]

    def plans(self, rest: str) -> list[Plan]:
        return [make_plan(self.sizes, request) for request in self.requests(rest)]

    def fitting(self, plans: Iterable[Plan]) -> Plan | None:
        return best_that_fits(((_divergence(plan), plan) for plan in plans), _resident(self.request))


def _resident(request: Request) -> Resident:
    return request.earlier.resident if request.earlier else None


def _divergence(plan: Plan) -> float:
    """Orders the dtypes at one sparsity: bfloat16 loses least, int4 most. Where neurons are dropped, int8 adds nothing
    to that loss which could be measured (docs/results.md: 0.277 and 0.276 at 25 %, 0.814 and 0.815 at 50 %)."""
    kept = plan.precision.kept
    if kept == "int8" and plan.precision.rest is None and plan.sparsity >= INT8_IS_FREE:
        return 0.0
    return float(RESIDENT_DTYPES.index(kept or RESIDENT_DTYPES[0]))


def _rungs(request: Request, resident_dtype: str | None, rest: str | None) -> list[Rung]:
    """The rungs that a resident dtype and a rest (None: any) leave to choose from."""
    asked = None if resident_dtype == AUTO else resident_dtype
    return [
        rung
        for rung in (BFLOAT16 if asked == RESIDENT_DTYPES[0] else LADDER)  # the ladder would rather quantize than drop
        if asked in (None, rung.resident_dtype)
        and (rest in (None, rung.rest) or not rung.sparsity)
        and not (request.empties and rung.rest != "drop")
    ]
