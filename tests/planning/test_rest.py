"""The neurons that are not kept: in int4 where that fits, or else dropped, unless the user said which."""

import re
from dataclasses import replace

import pytest

from griffin_offload.errors import BudgetError, OptionError
from griffin_offload.options import FfnSkip, Pruning, with_text
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.planning.ladder import BFLOAT16, best_plan, climb, describe
from griffin_offload.planning.plan import Plan
from griffin_offload.planning.request import Request
from griffin_offload.planning.sizes import ModelSizes
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import MIB, format_bytes

REQUEST = Request(512, 256, 0.0, 2**40)
SIZES = catalogue_sizes({**CATALOGUE["llama-2-7b"].config, "num_hidden_layers": 8})
HALF = Pruning(0.5)


def plan_of(pruning: Pruning, budget: int = 2**40, sizes: ModelSizes = SIZES, **request: object) -> Plan:
    return best_plan(sizes, replace(REQUEST, budget=budget, **request), pruning, "m")


def peak(**options: object) -> int:
    return plan_of(Pruning(**options)).peak


IN_INT4, DROPPED = peak(sparsity=0.5, rest="int4"), peak(sparsity=0.5, rest="drop")


def test_as_the_budget_falls_the_rest_is_in_int4_then_dropped_then_refused() -> None:
    found = []
    for budget in range(IN_INT4 + 64 * MIB, DROPPED - 64 * MIB, -16 * MIB):
        try:
            plan = plan_of(HALF, budget)
        except BudgetError:
            assert budget < DROPPED
            found.append("refused")
            continue
        assert plan.peak <= budget
        assert describe(plan) == f"bfloat16, 50% {'in int4' if budget >= IN_INT4 else 'dropped'}"
        found.append(str(plan.rest))
    assert list(dict.fromkeys(found)) == ["int4", "drop", "refused"]


def test_the_plan_says_what_was_taken_and_why() -> None:
    assert plan_of(HALF).rest_and_why == "in int4: fits the budget"
    assert plan_of(HALF, IN_INT4).rest_to_json() == {"taken": "int4", "why": "fits the budget"}
    dropped = plan_of(HALF, IN_INT4 - 1)
    needed, budget = format_bytes(IN_INT4), format_bytes(IN_INT4 - 1)
    said = f"dropped: with it {needed} are needed, the budget is {budget}; with --sparsity 0."
    assert dropped.rest_and_why.startswith(said)
    assert dropped.to_json()["rest"] == {"taken": "drop", "why": dropped.why_rest}
    assert "why_rest" not in dropped.to_json()
    for rest, taken in (("drop", "dropped"), ("int8", "in int8"), ("int4", "in int4")):
        assert plan_of(Pruning(0.5, rest=rest)).rest_and_why == f"{taken}: as asked"
    tight = plan_of(Pruning(), peak(sparsity=0, resident_dtype="int8") - 1)
    assert tight.rest_and_why == "in int4: the best that fits the budget"
    for whole in (plan_of(Pruning(0.0)), plan_of(Pruning()), plan_of(Pruning((0.0,) * 8))):
        assert (whole.rest, whole.rest_and_why, whole.to_json()["rest"]) == (None, "", None)


def test_the_sparsity_that_is_named_has_room_for_the_rest() -> None:
    budget = (IN_INT4 + DROPPED) // 2
    found = re.search(r"; with --sparsity ([\d.]+) it fits in int4", plan_of(HALF, budget).why_rest)
    assert found
    assert plan_of(Pruning(float(found[1])), budget).rest == "int4"
    assert plan_of(Pruning(float(found[1]) - 0.02), budget).rest == "drop", "no higher than need be"
    assert "--sparsity" not in plan_of(Pruning(0.9), peak(sparsity=0.9, rest="drop")).why_rest, "there is none"


@pytest.mark.parametrize(
    "options", [{}, {"rest": "auto"}, {"rest": "drop"}, {"rest": "int4"}, {"resident_dtype": "auto"}]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("short", [32 * MIB, 128 * MIB, 512 * MIB])
def test_what_is_refused_says_what_fits(options: dict[str, str], sparsity: float, short: int) -> None:
    pruning = Pruning(sparsity, **options)
    least = Pruning(sparsity, **{"rest": "drop", **{k: v for k, v in options.items() if v != "auto"}})
    if "resident_dtype" in options:
        least = replace(least, resident_dtype="int4")
    budget = plan_of(least).peak - short
    with pytest.raises(BudgetError) as caught:
        plan_of(pruning, budget)
    error = str(caught.value)
    assert f"m at sparsity {sparsity:g} needs" in error
    memory = re.search(r"--device-memory (\d+)MiB", error)
    assert memory
    assert plan_of(pruning, int(memory[1]) * MIB).fits
    if found := re.search(r"--sparsity ([\d.]+)(, the rest (\w+ ?\w*))?", error):
        plan = plan_of(replace(pruning, sparsity=float(found[1])), budget)
        assert plan.fits
        assert (found[3] is None) == (options.get("rest") in ("drop", "int4"))
        assert found[3] is None or plan.rest_and_why.startswith(found[3])
    else:
        assert "No sparsity fits" in error or "It fits with --rest drop" in error


def test_what_was_asked_for_is_kept_and_dropping_is_suggested() -> None:
    with pytest.raises(BudgetError, match=r"It fits with --sparsity 0\.\d+, with --rest drop, or with --device-memory"):
        plan_of(Pruning(0.5, rest="int4"), IN_INT4 - 20 * MIB)
    assert plan_of(Pruning(0.5, rest="drop"), IN_INT4 - 20 * MIB).rest == "drop"
    for dtype in ("int8", "int4"):
        assert plan_of(Pruning(0.5, resident_dtype=dtype)).precision.to_json()["experts"] == dtype
        assert plan_of(Pruning(0.5, resident_dtype=dtype)).rest == "int4"


def test_of_the_best_dtype_too_the_rest_is_kept_before_it_is_dropped() -> None:
    """Any dtype with the rest in int4 is better than bfloat16 with half of the neurons dropped: docs/results.md."""
    auto = Pruning(0.5, resident_dtype="auto")
    dtypes = ("bfloat16", "int8", "int4")
    peaks = {dtype: peak(sparsity=0.5, resident_dtype=dtype, rest="int4") for dtype in dtypes}
    assert sorted(peaks, key=peaks.__getitem__, reverse=True) == list(dtypes)
    for dtype in dtypes:
        assert describe(plan_of(auto, peaks[dtype])) == f"{dtype}, 50% in int4"
    assert describe(plan_of(auto, peaks["int4"] - 1)) == "int4, 50% dropped"


def test_with_a_dtype_alone_the_other_neurons_are_kept_before_half_are_dropped() -> None:
    sizes = replace(SIZES, layers=SIZES.layers * 4)
    *kept, (half, dropped) = climb(sizes, REQUEST, BFLOAT16)
    assert [rung.divergence for rung in BFLOAT16] == sorted(rung.divergence for rung in BFLOAT16)
    for rung, plan in kept:
        assert describe(plan_of(Pruning(resident_dtype="bfloat16"), plan.peak, sizes)) == str(rung)
    assert dropped.peak > kept[-1][1].peak, "better and smaller: half are dropped only for one who asks for that"
    assert describe(plan_of(Pruning(resident_dtype="bfloat16", rest="drop"), dropped.peak, sizes)) == str(half)


def test_blocks_that_a_prompt_empties_have_no_rest() -> None:
    emptied = plan_of(HALF, skip=FfnSkip(0.25, "prompt"))
    assert emptied.rest_and_why == "dropped: ffn-skip by prompt leaves blocks without neurons"
    assert plan_of(HALF, skip=FfnSkip(0.25, "token")).rest == "int4"
    with pytest.raises(OptionError, match="rest int4 keeps all"):
        plan_of(Pruning(0.5, rest="int4"), skip=FfnSkip(0.25, "prompt"))


def test_every_neuron_may_be_in_int4() -> None:
    assert plan_of(Pruning(1.0)).rest == "int4"
    assert plan_of(Pruning((0.0,) * 7 + (0.5,))).rest == "int4"


def test_a_method_stands_for_the_papers_choice() -> None:
    paper = Pruning(0.5, method="griffin")
    assert replace(paper, method=None) == Pruning(0.5, rest="drop", allocation="uniform", prior="off", fold=False)
    assert describe(plan_of(paper)) == "bfloat16, 50% dropped"
    for options, name in (
        ({"rest": "int4"}, "rest drop"),
        ({"selection": "random"}, "selection topk"),
        ({"allocation": "sensitivity"}, "allocation uniform"),
        ({"prior": "p.safetensors"}, "prior off"),
    ):
        with pytest.raises(OptionError, match=f"method griffin has {name}"):
            Pruning(0.5, method="griffin", **options)
    with pytest.raises(OptionError, match="method 'paper' is not known; known: griffin"):
        Pruning(0.5, method="paper")
    again = with_text(with_text(HALF, "method", "griffin"), "method", "none")
    assert again == HALF
