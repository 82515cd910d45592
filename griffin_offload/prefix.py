"""Prompts that begin alike: their beginning passes through the model once, and stays for the next batch."""

from contextlib import suppress
from dataclasses import replace

from .errors import BudgetError
from .generation import answer, make_plan_of
from .model.config_facts import rope_changes
from .model.kv_cache import why_no_crop, windows
from .offload.resident_model import ResidentModel
from .offload.shared_prefix import SharedPrefix
from .open_model import OpenModel
from .options import Decoding
from .planning.plan import Plan
from .planning.request import Earlier
from .planning.turn import Shared
from .report import Report
from .run import Asked


def with_prefix(opened: OpenModel, resident: ResidentModel, asked: Asked, tokens: int) -> Asked:
    """What is asked, so that the prompts' first tokens, which are the same, are not computed again: `tokens` of them at
    most, less than the shortest prompt has. They are computed now, if they are not in memory.

    Where that would change the answers, or does not fit, what is asked as it is, and why. Raises what `answer` does."""
    tokens = min(
        tokens, *(2 * window for window in windows(opened.config) if window), *(len(p) - 1 for p in asked.prompts)
    )
    why_not = _why_never(opened, asked)
    if why_not or tokens < 1:
        return replace(asked, shared=Shared(0, why_not))
    plan = make_plan_of(opened, asked)()
    if why_not := _why_not_now(opened, asked, tokens, plan):
        return replace(asked, shared=Shared(0, why_not))
    ids, report = asked.prompts[0][:tokens], None
    if not resident.has_prefix(ids, plan.kept):
        report = _compute(opened, resident, asked, ids)
    return replace(asked, shared=Shared(tokens), prefix_pass=report)


def _why_never(opened: OpenModel, asked: Asked) -> str:
    if asked.pruning.skip.share:
        return "blocks are skipped by what the whole prompt shows"
    if asked.decoding.lossless or asked.decoding.refresh:
        return "each prompt is answered alone"
    if rope_changes(opened.config):
        return "its rotary embedding changes with the length"
    return why_no_crop(opened.config)


def _why_not_now(opened: OpenModel, asked: Asked, tokens: int, plan: Plan) -> str:
    """`plan`: of what is asked without sharing."""
    if plan.cards:
        return "the model is on several GPUs"
    if plan.fold is not None:
        return "the fold is fitted to all tokens of the prompts"
    if plan.reads_again and opened.copies:
        return f"every pass brings the weights to {opened.device} again"
    with suppress(BudgetError):
        shared = make_plan_of(opened, asked)(earlier=Earlier(tokens, shared=True))
        alone = opened.plan(tokens, 1, asked.pruning, earlier=Earlier())
        is_same = _kept(plan) == _kept(shared) == _kept(alone)
        return "" if is_same else "other neurons or formats would be kept"
    return "the budget has no room for it"


def _kept(plan: Plan) -> tuple[object, ...]:
    return plan.kept, plan.precision


def _compute(opened: OpenModel, resident: ResidentModel, asked: Asked, ids: list[int]) -> Report:
    """One pass over the tokens, which leaves them as `resident.prefix`."""
    once = Decoding(max_new_tokens=1, greedy=True, no_fidelity=True)
    (made,) = answer(opened, resident, Asked([ids], asked.pruning, once, on_layer=asked.on_layer, continues=True))
    if made.finish_reason == "interrupted":
        raise KeyboardInterrupt
    cache, _, statistics = resident.turns.saved()
    resident.turns.clear()
    resident.prefix = SharedPrefix(ids, cache, statistics.get(len(ids), ()))
    return made.report
