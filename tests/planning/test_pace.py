"""Expected tokens a second, and what the ladder makes of them: with speeds that are made up."""

from dataclasses import replace
from itertools import permutations

import pytest

from griffin_offload.errors import BudgetError
from griffin_offload.model.format_speeds import Speeds
from griffin_offload.options import Pruning
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.planning.ladder import LADDER, Rung, best_plan, best_that_fits, climb, describe
from griffin_offload.planning.plan import Plan
from griffin_offload.planning.request import Request
from griffin_offload.planning.sizes import ModelSizes
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import GIB

REQUEST = Request(512, 256, 0.0, 2**40)
DTYPES = ("bfloat16", "int8", "int4")
# KL at a given sparsity, the others dropped: the worse of two models (docs/results.md), where int8 equals bfloat16.
DROPPED = {0.25: (0.277, 0.277, 0.367), 0.5: (0.815, 0.815, 0.852), 0.75: (2.875, 2.875, 2.914)}


def of_layers(count: int, alias: str = "llama-2-7b") -> ModelSizes:
    return catalogue_sizes({**CATALOGUE[alias].config, "num_hidden_layers": count})


@pytest.fixture(scope="module")
def sizes() -> ModelSizes:
    """Few layers: what is needed only during the prompt counts as much, so that no order of the peaks is sure."""
    return of_layers(4)


def speeds(dense: float, int8: float, int4: float) -> Speeds:
    return Speeds((("", dense), ("int8", int8), ("int4", int4)))


def all_orders() -> list[Speeds]:
    """Every order of three speeds; the lowest is slower for a weight, not only for a byte."""
    return [speeds(*order) for order in permutations((1e9, 5e9, 25e9))]


def dominated(taken: tuple[float, Plan], candidates: list[tuple[float, Plan]]) -> bool:
    """Whether another one that fits is no worse and no slower, and better in one of both."""
    worse, slow = taken[0], -taken[1].tokens_per_s
    others = [(loss, -plan.tokens_per_s) for loss, plan in candidates if plan.fits]
    return any(loss <= worse and pace <= slow and (loss, pace) != (worse, slow) for loss, pace in others)


@pytest.mark.parametrize("rung", LADDER, ids=str)
@pytest.mark.parametrize("alias", ["llama-2-7b", "smollm2-135m"])
def test_a_token_takes_what_each_format_takes(alias: str, rung: Rung) -> None:
    """The bytes of all formats are those that a token reads; with one speed for all, the pace is speed / bytes."""
    sizes = of_layers(2, alias)
    (_, plan), *_ = climb(sizes, replace(REQUEST, speeds=speeds(1e9, 1e9, 1e9)), [rung])
    assert plan.tokens_per_s == pytest.approx(1e9 / plan.bytes_per_token)
    (_, slow), *_ = climb(sizes, replace(REQUEST, speeds=speeds(1e9, 1e9, 1e6)), [rung])
    assert (slow.tokens_per_s < plan.tokens_per_s / 2) == ("int4" in (rung.resident_dtype, rung.rest))
    (_, unknown), *_ = climb(sizes, REQUEST, [rung])
    assert unknown.tokens_per_s is None
    assert unknown.peak == plan.peak


def test_a_token_reads_the_quantized_bytes_at_their_speed() -> None:
    """Against the obvious sum, of a model without biases, with an embedding that is not lm_head."""
    sizes, hidden, neurons = of_layers(2), 4096, 11008
    (_, plan), *_ = climb(sizes, replace(REQUEST, speeds=speeds(1e15, 1e9, 1e15)), [LADDER[3]])  # half int8, half int4
    weights = 2 * (4 * hidden * hidden + 3 * hidden * neurons / 2) + 32000 * hidden  # and lm_head
    assert plan.tokens_per_s == pytest.approx(1e9 / weights, rel=0.01)


@pytest.mark.parametrize("pace", all_orders())
def test_nothing_is_taken_that_is_slower_and_no_better(sizes: ModelSizes, pace: Speeds) -> None:
    everything = climb(sizes, replace(REQUEST, speeds=pace))
    budgets = sorted({plan.peak for _, plan in everything})
    for dtype, rest in ((None, None), ("auto", None), ("int4", None), ("int8", "drop"), (None, "int4")):
        for budget in budgets:
            request = replace(REQUEST, speeds=pace, budget=budget)
            rungs = [
                rung
                for rung in LADDER
                if dtype in (None, "auto", rung.resident_dtype) and (not rung.sparsity or rest in (None, rung.rest))
            ]
            candidates = [(rung.divergence, plan) for rung, plan in climb(sizes, request, rungs)]
            try:
                plan = best_plan(sizes, request, Pruning(resident_dtype=dtype, rest=rest), "m")
            except BudgetError:
                assert not any(plan.fits for _, plan in candidates)
            else:
                (loss,) = {loss for loss, other in candidates if other == plan}
                assert loss == min(loss for loss, other in candidates if other.fits)
                assert not dominated((loss, plan), candidates)


@pytest.mark.parametrize("pace", all_orders())
@pytest.mark.parametrize("sparsity", DROPPED)
def test_nor_beside_a_given_sparsity(sizes: ModelSizes, pace: Speeds, sparsity: float) -> None:
    request = replace(REQUEST, speeds=pace)
    rungs = [Rung(d, sparsity, "drop", loss) for d, loss in zip(DTYPES, DROPPED[sparsity], strict=True)]
    pruning = Pruning(sparsity=sparsity, resident_dtype="auto", rest="drop")
    for budget in [plan.peak for _, plan in climb(sizes, request, rungs)]:
        candidates = [(r.divergence, p) for r, p in climb(sizes, replace(request, budget=budget), rungs)]
        plan = best_plan(sizes, replace(request, budget=budget), pruning, "m")
        (loss,) = {loss for loss, other in candidates if other == plan}
        assert not dominated((loss, plan), candidates)


def test_int4_that_is_slower_than_int8_is_not_taken_where_int8_fits() -> None:
    sizes = of_layers(32)
    plans = {str(rung): plan for rung, plan in climb(sizes, REQUEST)}
    slow = replace(REQUEST, speeds=speeds(10e9, 15e9, 2e9), budget=plans["int8"].peak)
    for pruning in (Pruning(), Pruning(resident_dtype="auto"), Pruning(sparsity=0.0, resident_dtype="auto")):
        assert describe(best_plan(sizes, slow, pruning, "m")) == "int8"
    dropped = best_plan(sizes, slow, Pruning(sparsity=0.5, resident_dtype="auto", rest="drop"), "m")
    assert describe(dropped) == "int8, 50% dropped"


def test_of_equals_the_fastest_is_taken_and_of_unknown_ones_the_first() -> None:
    """Beside dropped neurons int8 loses nothing: it is taken where it is faster, and not where it has no kernels."""
    sizes = of_layers(32)
    pruning = Pruning(sparsity=0.5, resident_dtype="auto", rest="drop")

    def taken(pace: Speeds | None, pruning: Pruning = pruning, budget: int = 64 * GIB) -> str:
        return describe(best_plan(sizes, replace(REQUEST, speeds=pace, budget=budget), pruning, "m"))

    assert taken(speeds(10e9, 15e9, 10e9)) == "int8, 50% dropped"
    assert taken(speeds(10e9, 4e9, 10e9)) == "bfloat16, 50% dropped"
    assert taken(None) == "bfloat16, 50% dropped"
    for options in ({"sparsity": 0.1, "rest": "drop"}, {"sparsity": 0.5, "rest": "int4"}, {"sparsity": 0.5}):
        kept = Pruning(resident_dtype="auto", **options)
        assert taken(speeds(1e9, 90e9, 90e9), kept).startswith("bfloat16")
    assert taken(speeds(1e9, 90e9, 90e9), Pruning()) == "bfloat16"
    plan = best_plan(sizes, replace(REQUEST, speeds=speeds(1e9, 1e9, 1e9)), pruning, "m")
    fast, none = replace(plan, tokens_per_s=9e9), replace(plan, tokens_per_s=None)
    for first, second in ((plan, fast), (fast, plan)):
        assert best_that_fits([(0.5, first), (0.5, second)]) is fast
    assert best_that_fits([(0.5, none), (0.5, replace(none, budget=2**50))]) is none
    assert best_that_fits([(0.5, replace(plan, budget=0))]) is None
