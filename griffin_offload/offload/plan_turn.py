"""The plan of a conversation's turn: what it takes over from the turns before it, where that is right and fits."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from ..errors import BudgetError
from ..model.config_facts import rope_changes
from ..model.kv_cache import why_not_kept
from ..model.layout import ModelLayout
from ..options import Pruning
from ..planning.plan import Plan
from ..planning.request import Earlier
from ..planning.turn import Turn
from .resident_model import ResidentModel

NO_ROOM = "the budget has no room beside what was kept of it"


def plan_turn(
    resident: ResidentModel,
    continues: bool,
    prompts: Sequence[Sequence[int]],
    pruning: Pruning,
    layout: ModelLayout,
    make_plan: Callable[..., Plan],
) -> tuple[Plan, Turn | None]:
    """A prompt, token ids of the whole conversation -> its plan, and how many of its tokens are kept and computed.
    Prompts that are no turn (not `continues`): their plan alone.

    `make_plan(earlier=...)` plans it. Raises what that does."""
    if not continues:
        return make_plan(), None
    (ids,) = prompts
    if why_not := _why_alone(pruning, layout):
        return make_plan(), Turn(0, len(ids), why_not)
    turns = resident.turns
    if (last := turns.may_repeat(ids, pruning)) and resident.plan_of_layers == (last.plan.kept, last.plan.precision):
        with suppress(BudgetError):
            plan = make_plan(earlier=Earlier(len(ids), resident.plan_of_layers, ends=resident.ends), fidelity=False)
            if (plan.kept, plan.precision, plan.ends) == (*resident.plan_of_layers, resident.ends):
                plan = replace(plan, fold=last.plan.fold, no_room_to_fold=last.plan.no_room_to_fold)
                return plan, Turn(len(ids), 0)
    kept, why_not = turns.shared(ids)
    if kept:
        in_memory = resident.plan_of_layers if turns.pruning == pruning else None
        try:
            plan = make_plan(earlier=Earlier(kept, in_memory, ends=resident.ends))
            if resident.can_add_to(kept, plan):
                return plan, Turn(kept, len(ids) - kept)
            why_not = "how it used its neurons is not known"
        except BudgetError:
            why_not = NO_ROOM
    try:
        return make_plan(earlier=Earlier()), Turn(0, len(ids), why_not)
    except BudgetError:
        return make_plan(), Turn(0, len(ids), why_not)


def _why_alone(pruning: Pruning, layout: ModelLayout) -> str:
    """Why a turn can take over nothing from others, whatever they are; '' if it can."""
    if pruning.skip.share:
        return "blocks are skipped by what the whole prompt shows"
    if rope_changes(layout.config):
        return "its rotary embedding changes with the length"
    return why_not_kept(layout.config, layout.state_bytes)
