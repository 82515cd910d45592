"""What is kept, and in which precision, where nobody says: the best rung of a ladder that fits.

Quality comes first, speed decides between equals. So a rung that is slower and no better than another that fits is
never taken."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import BudgetError
from ..options import AUTO, RESIDENT_DTYPES, Pruning, Sparsity
from ..pruning.selection import check_sparsities
from ..quant.precision import precision
from ..units import format_bytes
from .plan import Plan, check_request, choose_plan, enough, make_plan
from .request import Request
from .sizes import ModelSizes


@dataclass(frozen=True)
class Rung:
    """One way to keep a model. `divergence`: KL of the next token's distribution from the whole model's, in nats: the
    larger of two small models' on WikiText-2 (docs/results.md). Larger models lose less."""

    resident_dtype: str
    sparsity: float
    rest: str
    divergence: float

    def __str__(self) -> str:
        """'int8', 'int4, 50 % dropped', 'int8, 75 % in int4'."""
        if not self.sparsity:
            return self.resident_dtype
        rest = "dropped" if self.rest == "drop" else f"in {self.rest}"
        return f"{self.resident_dtype}, {self.sparsity:.0%} {rest}"


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
INT8_IS_FREE = 0.25  # share of dropped neurons from which on int8 costs no quality


def describe(plan: Plan) -> str:
    """What a plan keeps, as a rung says it."""
    kept, rest = plan.precision.kept or RESIDENT_DTYPES[0], plan.precision.rest or "drop"
    return str(Rung(kept, plan.sparsity, rest, 0.0))


def chooses_format(pruning: Pruning, plan: Plan) -> bool:
    """Whether a plan's formats were chosen for the user, and speeds had a say in it, or could have had."""
    return pruning.resident_dtype == AUTO if pruning.sparsity is not None else plan.precision.quantized


def best_that_fits(plans: Iterable[tuple[float, Plan]]) -> Plan | None:
    """Of (divergence, plan) the plan that fits and has the least; of equals the fastest, or the first if no speed is
    known."""
    fitting = [(divergence, -(plan.tokens_per_s or 0.0), plan) for divergence, plan in plans if plan.fits]
    return min(fitting, key=lambda found: found[:2], default=(0.0, 0.0, None))[2]


def climb(sizes: ModelSizes, request: Request, rungs: Sequence[Rung] = LADDER) -> list[tuple[Rung, Plan]]:
    """The plan of every rung, whether or not it fits."""
    plans = []
    for rung in rungs:
        asked = replace(request, sparsity=rung.sparsity, precision=precision(rung.resident_dtype, rung.rest))
        plans.append((rung, make_plan(sizes, asked)))
    return plans


@lru_cache(maxsize=256)
def best_plan(sizes: ModelSizes, request: Request, pruning: Pruning, name: str) -> Plan:
    """The plan to run: as `pruning` asks; what it leaves open (None) from the ladder, the best rung that fits.

    A sparsity alone asks for the paper: bfloat16, the other neurons dropped; with resident dtype 'auto', for the best
    dtype that fits. Raises PromptError, OptionError, and BudgetError for what does not fit."""
    request = check_request(sizes, request, name)
    if pruning.sparsity is not None:
        return _asked_plan(sizes, request, pruning, pruning.sparsity, name)
    plans = climb(sizes, request, _rungs(request, pruning))
    if found := best_that_fits((rung.divergence, plan) for rung, plan in plans):
        return found
    rung, least = min(plans, key=lambda pair: pair[1].peak)
    raise BudgetError(
        f"{name} needs at least {format_bytes(least.peak)} ({rung}; {least.prompt_tokens} + "
        f"{least.max_new_tokens} tokens); the budget is {format_bytes(request.budget)}. "
        f"Give --device-memory {enough(least)}, or fewer tokens"
    )


def _asked_plan(sizes: ModelSizes, request: Request, pruning: Pruning, sparsity: Sparsity, name: str) -> Plan:
    """The plan at a given sparsity, in the given dtype or the best that fits."""
    auto, rest = pruning.resident_dtype == AUTO, pruning.rest or "drop"
    dtypes = RESIDENT_DTYPES if auto else (pruning.resident_dtype or RESIDENT_DTYPES[0],)
    *others, last = (replace(request, precision=precision(dtype, rest)) for dtype in dtypes)
    if others:
        given = check_sparsities(sparsity)
        plans = [make_plan(sizes, replace(each, sparsity=given)) for each in (*others, last)]
        if found := best_that_fits([(_divergence(plan), plan) for plan in plans]):
            return found
    return choose_plan(sizes, last, sparsity, name)


def _divergence(plan: Plan) -> float:
    """Orders the dtypes at one sparsity: bfloat16 loses least, int4 most. Where neurons are dropped, int8 adds nothing
    to that loss which could be measured (docs/results.md: 0.277 and 0.276 at 25 %, 0.814 and 0.815 at 50 %)."""
    kept = plan.precision.kept
    if kept == "int8" and plan.precision.rest is None and plan.sparsity >= INT8_IS_FREE:
        return 0.0
    return float(RESIDENT_DTYPES.index(kept or RESIDENT_DTYPES[0]))


def _rungs(request: Request, pruning: Pruning) -> list[Rung]:
    """The rungs that a resident dtype and a rest leave to choose from."""
    asked, rest = None if pruning.resident_dtype == AUTO else pruning.resident_dtype, pruning.rest
    if asked == RESIDENT_DTYPES[0] and rest in (None, "drop"):  # the ladder has no such rung: it would rather quantize
        return [LADDER[0], Rung(asked, 0.5, "drop", 0.815)]
    return [
        rung
        for rung in LADDER
        if asked in (None, rung.resident_dtype)
        and (rest in (None, rung.rest) or not rung.sparsity)
        and not (request.empties and rung.rest != "drop")
    ]
