"""What would keep more of the full model, and fits the budget: options to give instead of those of a plan."""

from collections.abc import Iterator
from dataclasses import replace

from ..options import RESIDENT_DTYPES
from ..quant.precision import precision
from .plan import Plan, enough, make_plan, smallest_sparsity
from .request import Request
from .sizes import ModelSizes

FAR_LESS = 0.05  # a sparsity is worth a try where it is that much lower


def what_helps(sizes: ModelSizes, request: Request, plan: Plan) -> list[str]:
    """Options such as '--rest int4', best first, with which the `request` of a plan fits and loses less.

    The first of the formats that fits and, if neurons are dropped, the least sparsity that does. Where nothing fits,
    the memory that would be enough for the format that needs least."""
    if not plan.reads_again:
        return []
    formats = [
        (words, make_plan(sizes, replace(request, sparsity=sparsity, precision=precision(dtype, rest))))
        for words, sparsity, dtype, rest in _better(plan, request)
    ]
    found = [words for words, each in formats if each.fits][:1]
    drops = plan.prunes and plan.precision.rest is None
    if drops and "--sparsity 0" not in found:
        least = smallest_sparsity(sizes, replace(request, precision=plan.precision))
        if least is not None and least <= plan.sparsity - FAR_LESS:
            found.append(f"--sparsity {least:g}")
    if not found:
        words, smallest = min(formats, key=lambda each: each[1].peak)
        found = [f"{words} --device-memory {enough(smallest)}"]
    return found


def _better(plan: Plan, request: Request) -> Iterator[tuple[str, float, str, str]]:
    """Words, sparsity, resident dtype and rest of what loses less than a plan, best first (see ladder.LADDER)."""
    kept = plan.precision.kept or RESIDENT_DTYPES[0]
    yield "--sparsity 0", 0.0, RESIDENT_DTYPES[0], "drop"
    drops = plan.prunes and plan.precision.rest is None
    if drops and not request.empties:
        for rest in ("int8", "int4"):
            if RESIDENT_DTYPES.index(rest) >= RESIDENT_DTYPES.index(kept):
                yield f"--rest {rest}", plan.sparsity, kept, rest
    if kept == "int4" or drops or plan.precision.rest == "int4":
        yield "--sparsity 0 --resident-dtype int8", 0.0, "int8", "drop"
    if kept != "int8" and (drops or kept == "int4") and not request.empties:
        yield "--sparsity 0.5 --resident-dtype int8 --rest int4", 0.5, "int8", "int4"
    if drops:
        yield "--sparsity 0 --resident-dtype int4", 0.0, "int4", "drop"
