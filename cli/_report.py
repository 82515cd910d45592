"""What is told of a run's plan, and kept of its report."""

from typing import TYPE_CHECKING

from ..errors import GriffinError
from ..options import AUTO, Pruning
from ..units import format_bytes
from . import _console as console

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..report import Report


def choice_note(pruning: Pruning, plan: "Plan", dtype: str) -> str | None:
    """What was chosen to fit, where the user left it open; None where not."""
    from ..planning.ladder import describe

    by_prompt = pruning.skip.share and pruning.skip.by_prompt
    if pruning.sparsity is not None and pruning.rest in (None, AUTO) and plan.rest == "drop" and not by_prompt:
        return f"the rest {plan.rest_and_why}"
    if pruning.sparsity is not None or pruning.resident_dtype not in (None, AUTO):
        return None
    if not plan.reads_again:
        return "the whole model fits the device: no offloading needed; nothing is pruned (use --sparsity to prune)"
    if pruning.skip.share and plan.sparsity == 0 and not plan.precision.quantized:
        return None  # all that was asked for, and no more
    kept = describe(plan).replace("bfloat16", dtype)
    return f"to fit {format_bytes(plan.budget)}: {kept} (griffin mem-report --model shows the choices)"


def remember(report: "Report") -> None:
    """Keep the report for `griffin mem-report --last`. A cache that cannot be written is no reason to fail."""
    from ..paths import cache_folder
    from ..report import save_last

    try:
        save_last(report, cache_folder())
    except (OSError, GriffinError) as error:
        console.note(f"the report was not saved for mem-report --last: {error}")
