"""Plans for drafts that the full model verifies: what is resident, how many drafts, what does not fit."""

from dataclasses import replace

import pytest

from griffin_offload.errors import BudgetError
from griffin_offload.options import Pruning
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.planning.lossless import DRAFTS, MOST_DRAFTS, expected_tokens_per_s, lossless_plan
from griffin_offload.planning.plan import make_plan
from griffin_offload.planning.request import Request
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import GIB, MIB

SIZES = catalogue_sizes(CATALOGUE["llama-3.2-3b-instruct"].config)
ASKED = Request(512, 256, 0.0, 64 * GIB, drafts=MOST_DRAFTS)


def test_the_whole_model_where_it_fits() -> None:
    plan = lossless_plan(SIZES, ASKED, Pruning(), "a model")
    assert (plan.reads_again, plan.drafts) == (False, 0)


@pytest.mark.parametrize("budget", [6, 5, 4, 3.4])
def test_the_fastest_drafts_that_fit(budget: float) -> None:
    request = replace(ASKED, budget=int(budget * GIB))
    plan = lossless_plan(SIZES, request, Pruning(), "a model")
    assert plan.fits
    assert plan.drafts
    assert not plan.precision.head
    assert plan.streamed_bytes
    kept = (plan.precision.kept or "bfloat16", plan.sparsity, plan.rest or "drop")
    (taken,) = (draft for draft in DRAFTS if (draft.resident_dtype, draft.sparsity, draft.rest) == kept)
    for draft in DRAFTS:
        formats = request.formats(draft.resident_dtype, draft.rest)
        other = make_plan(SIZES, replace(request, sparsity=draft.sparsity, precision=formats))
        if other.fits:
            best = expected_tokens_per_s(other, draft.acceptance)
            assert expected_tokens_per_s(plan, taken.acceptance) >= best


@pytest.mark.parametrize("pruning", [Pruning(), Pruning(sparsity=0.5, rest="int4")])
def test_fewer_drafts_where_memory_is_short(pruning: Pruning) -> None:
    """Gemma 3's vocabulary of 262144: the logits of 33 tokens take 190 MiB."""
    sizes = catalogue_sizes(CATALOGUE["gemma-3-4b-it"].config)

    def drafts(budget: int) -> int:
        return lossless_plan(sizes, replace(ASKED, budget=budget), pruning, "a model").drafts

    least = next(budget for budget in range(3 * GIB, 9 * GIB, 32 * MIB) if _fits(sizes, budget, pruning))
    assert 0 < drafts(least) < MOST_DRAFTS
    with pytest.raises(BudgetError, match="a model"):
        drafts(least - 64 * MIB)


def _fits(sizes: object, budget: int, pruning: Pruning) -> bool:
    try:
        return bool(lossless_plan(sizes, replace(ASKED, budget=budget), pruning, "a model"))  # type: ignore[arg-type]
    except BudgetError:
        return False
