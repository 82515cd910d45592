"""What would keep more of the full model, and fits the budget: options to give instead of those of a plan."""

from collections.abc import Iterator
from dataclasses import replace

from ..options import RESIDENT_DTYPES
from ..quant.precision import precision
from .ladder import REST
from .plan import Plan, enough, make_plan, room_at, smallest_sparsity
from .request import Request
from .sizes import ModelSizes

FAR_LESS = 0.05  # a sparsity is worth a try where it is that much lower


def what_helps(
    sizes: ModelSizes, request: Request, plan: Plan, chosen: bool = False, method: str | None = None
) -> list[str]:
    """Options such as '--rest int4' that make the `request` of a plan keep more, and fit.

    If neurons are dropped: --rest int4, which costs little memory, if need be at a higher sparsity. The first of the
    formats that fits and, if that drops neurons too, the least sparsity that does. Where nothing fits, or the plan was
    `chosen` for the user as the best that does, the memory that would be enough for the next format. `method`: one that
    was asked for, and has no other rest."""
    if not plan.reads_again:
        return []
    better = [(words, make_plan(sizes, each)) for words, each in _better(plan, request)]
    fitting = [(words, each) for words, each in better if each.fits][:1]
    found = [words for words, _ in fitting]
    if _drops(plan) and all(each.prunes for _, each in fitting):
        least = smallest_sparsity(sizes, replace(request, precision=plan.precision))
        if least is not None and least <= plan.sparsity - FAR_LESS:
            found.append(f"--sparsity {least:g}")
    if _drops(plan) and not request.empties and not any("--rest" in words for words in found):
        room = room_at(sizes, [replace(request, precision=precision(_dtype(plan), REST))])
        if room is not None:
            found.insert(0, f"--sparsity {room:g} --rest {REST}" if room > plan.sparsity else f"--rest {REST}")
    if chosen or not found:
        words, smallest = min(better, key=lambda each: each[1].peak)
        memory = f"--device-memory {enough(smallest)}"
        return [memory if chosen else f"{words} {memory}"]
    return [f"{words} without --method {method}" if method and "--rest" in words else words for words in found]


def _drops(plan: Plan) -> bool:
    return plan.prunes and plan.precision.rest is None


def _better(plan: Plan, request: Request) -> Iterator[tuple[str, Request]]:
    """What loses less than a plan, best first (see ladder.LADDER): in words, and as a request."""
    for sparsity, dtype, rest in _less_lost(plan, request):
        words = [f"--sparsity {sparsity:g}"] if sparsity != plan.sparsity else []
        words += [f"--resident-dtype {dtype}"] if dtype != _dtype(plan) else []
        words += [f"--rest {rest}"] if sparsity and rest != (plan.precision.rest or "drop") else []
        yield " ".join(words), replace(request, sparsity=sparsity, precision=precision(dtype, rest))


def _less_lost(plan: Plan, request: Request) -> Iterator[tuple[float, str, str]]:
    """Sparsity, resident dtype and rest."""
    drops, kept, keeps_rest = _drops(plan), _dtype(plan), not request.empties
    yield 0.0, RESIDENT_DTYPES[0], "drop"
    for rest in ("int8", "int4") if drops and keeps_rest else ():
        if RESIDENT_DTYPES.index(rest) >= RESIDENT_DTYPES.index(kept):
            yield plan.sparsity, kept, rest
    if drops or "int4" in (kept, plan.precision.rest):
        yield 0.0, "int8", "drop"
    if keeps_rest and (kept == "int4" or (drops and kept != "int8")):
        yield plan.sparsity or 0.5, "int8", "int4"
    if drops:
        yield 0.0, "int4", "drop"


def _dtype(plan: Plan) -> str:
    return plan.precision.kept or RESIDENT_DTYPES[0]
