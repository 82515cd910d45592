"""What is chosen where nobody says what to keep: it fits, it is the best that does, and a larger budget is no worse."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint

from griffin_offload import Engine, Pruning
from griffin_offload.errors import BudgetError, OptionError
from griffin_offload.planning.ladder import LADDER, best_plan, climb, describe
from griffin_offload.planning.request import Earlier
from griffin_offload.units import MIB, parse_bytes

SIZES = {"hidden_size": 768, "intermediate_size": 6144, "num_hidden_layers": 16, "vocab_size": 300}
NAMES = [str(rung) for rung in LADDER]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ladder") / "m", "llama", dtype=torch.bfloat16, **SIZES)


def test_the_ladder_goes_down_in_quality_and_bytes(folder: Path) -> None:
    assert [rung.divergence for rung in LADDER] == sorted(rung.divergence for rung in LADDER)
    engine = Engine(folder)
    sizes = [plan.resident_bytes for _, plan in climb(engine.sizes, engine.opened.request(40, 10))]
    assert sizes == sorted(sizes, reverse=True)


def test_over_all_budgets_the_choice_fits_and_is_never_worse_with_more(folder: Path) -> None:
    engine = Engine(folder)
    peaks = [plan.peak for _, plan in climb(engine.sizes, engine.opened.request(40, 10))]
    taken = []
    for budget in range(min(peaks) - 20 * MIB, max(peaks) + 30 * MIB, 4 * MIB):
        engine.budget = budget
        try:
            plan = engine.plan(40, 10)
        except BudgetError:
            assert budget < min(peaks)
            assert not taken
        else:
            assert plan.peak <= budget
            taken.append(NAMES.index(describe(plan)))
    assert taken == sorted(taken, reverse=True)
    assert {len(LADDER) - 1, 0} < set(taken)
    assert taken[-1] == 0


IN_A_PROCESS = """
import sys
from griffin_offload import Engine
from griffin_offload.planning.ladder import climb, describe
engine, rung = Engine(sys.argv[1]), int(sys.argv[2])
prompt = list(range(4, 44))
engine.budget = climb(engine.sizes, engine.opened.request(40, 4))[rung][1].peak
report = engine.generate(prompt, max_new_tokens=4).report
assert report.measured_peak <= report.plan.peak <= engine.budget, (report.measured_peak, report.plan.peak)
print(describe(report.plan))
"""


def run(*arguments: object) -> str:
    """In a process of its own: what this one holds of other tests would count."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("rung", [0, 2, 3, 6, len(LADDER) - 1])
def test_the_measured_peak_stays_inside(folder: Path, rung: int) -> None:
    """At a budget that just takes a rung, and no better one."""
    assert run("-c", IN_A_PROCESS, folder, rung).strip() == NAMES[rung]


def test_what_is_given_is_kept(folder: Path) -> None:
    engine = Engine(folder)
    by_name = dict(zip(NAMES, climb(engine.sizes, engine.opened.request(40, 4)), strict=True))

    def taken(peak_of: str, **options: object) -> str:
        engine.budget = by_name[peak_of][1].peak
        return describe(engine.plan(40, 4, **options))  # type: ignore[arg-type]

    assert taken("bfloat16", resident_dtype="int4") == "int4"
    assert taken("int4, 50% dropped", resident_dtype="int4") == "int4, 50% dropped"
    assert taken("bfloat16", sparsity=0.5) == "bfloat16, 50% in int4"
    assert taken("bfloat16", sparsity=0.5, rest="drop") == "bfloat16, 50% dropped"
    assert taken("bfloat16", sparsity=0.5, resident_dtype="auto", rest="drop") == "bfloat16, 50% dropped"
    assert taken("int4, 50% dropped", sparsity=0.5, resident_dtype="auto") == "int4, 50% dropped"
    assert taken("int4", rest="drop") == "int4"
    assert taken("int8, 50% in int4", rest="drop") == "int4"
    engine.budget = 2**40
    engine.budget = engine.plan(40, 4, sparsity=0.5, method="griffin").peak
    assert describe(engine.plan(40, 4, resident_dtype="bfloat16", rest="drop")) == "bfloat16, 50% dropped"
    assert describe(engine.plan(40, 4, resident_dtype="bfloat16")) == "bfloat16, 50% dropped"
    engine.budget = 2**40
    engine.budget = engine.plan(40, 4, sparsity=0.75, rest="int4").peak
    assert describe(engine.plan(40, 4, resident_dtype="bfloat16")) == "bfloat16, 75% in int4"
    engine.budget = 2**40
    engine.budget = engine.plan(40, 4, sparsity=0.5, resident_dtype="int8", rest="drop").peak
    dropped = engine.plan(40, 4, sparsity=0.5, resident_dtype="auto", rest="drop")
    assert describe(dropped) == "int8, 50% dropped"
    with pytest.raises(BudgetError, match=r"sparsity 0\.5 needs"):
        taken("int4, 75% dropped", sparsity=0.5)
    with pytest.raises(OptionError, match="resident_dtype 'int3' is not known; known: auto, bfloat16, int8, int4"):
        engine.plan(40, 4, sparsity=0.5, resident_dtype="int3")


def test_where_nothing_fits_the_least_is_named_and_works(folder: Path) -> None:
    engine = Engine(folder)
    engine.budget = 50 * MIB
    with pytest.raises(BudgetError, match=r"needs at least .* \(int4, 75% dropped; 40 \+ 4 tokens\)") as caught:
        engine.plan(40, 4)
    engine.budget = parse_bytes(str(caught.value).split("--device-memory ")[1].split(",")[0])
    assert engine.plan(40, 4).precision.kept == "int4"


def test_commands_say_what_they_took(folder: Path) -> None:
    def griffin(*arguments: object) -> str:
        return run("-c", "from griffin_offload.cli.main import main; main()", *arguments)

    options = ("--model", folder, "--max-new-tokens", 2)
    generate = ("generate", *options, "--prompt", "Hello")
    assert "the whole model fits the device" in griffin(*generate)
    report = ("mem-report", *options, "--prompt-tokens", 20, "--resident-dtype", "auto")
    rungs = json.loads(griffin(*report, "--json"))["ladder"]
    assert all(rung["tokens_per_s"] > 0 for rung in rungs)
    peak = rungs[3]["planned_peak_bytes"]
    assert "to fit" in griffin(*generate, "--device-memory", peak)
    lines = griffin(*report, "--device-memory", peak).splitlines()
    marks = [next((m for m in ("too large", "taken", "fits") if line.startswith(f" {m} ")), "") for line in lines]
    found = [mark for mark in marks if mark]
    assert len(found) == len(LADDER)
    assert found.count("taken") == 1
    assert set(found[: found.index("taken")]) == {"too large"}
    assert "to fit" not in griffin(*generate, "--sparsity", 0.9)


# The next turn of a conversation


def test_what_is_in_memory_stays_as_long_as_it_fits(folder: Path) -> None:
    """A shorter pass would leave room for a better rung, which would have to be read."""
    engine = Engine(folder)
    sizes = replace(engine.sizes, context=8192)
    request = engine.opened.request(400, 10)
    plans = dict(climb(sizes, request))
    worse = LADDER[3]
    resident = plans[worse].kept, plans[worse].precision
    request = replace(request, budget=2**40)
    assert best_plan(sizes, request, Pruning(), "m").precision.kept == ""
    stays = best_plan(sizes, replace(request, earlier=Earlier(390, resident)), Pruning(), "m")
    assert (stays.kept, stays.precision) == resident
    assert (stays.earlier_tokens, stays.pass_tokens, stays.continues) == (390, 10, True)
    less = replace(request, budget=stays.peak - 1, earlier=Earlier(390, resident))
    found = best_plan(sizes, less, Pruning(), "m")
    assert (found.kept, found.precision) != resident
    assert found.fits


def test_at_a_sparsity_the_rest_that_is_in_memory_stays(folder: Path) -> None:
    engine = Engine(folder)
    sizes = replace(engine.sizes, context=8192)
    pruning = Pruning(sparsity=0.5)
    request = engine.opened.request(400, 10)
    dropped = best_plan(sizes, request, replace(pruning, rest="drop"), "m")
    request = replace(request, earlier=Earlier(390, (dropped.kept, dropped.precision)))
    stays = best_plan(sizes, request, pruning, "m")
    assert stays.rest_and_why == "dropped: as in the turn before"
    assert best_plan(sizes, replace(request, earlier=Earlier(390)), pruning, "m").rest == "int4"


def test_a_turn_of_few_tokens_needs_less_than_the_whole_conversation(folder: Path) -> None:
    engine = Engine(folder)
    sizes = replace(engine.sizes, context=8192)
    request = replace(engine.opened.request(4000, 10), fidelity=True, fold=0.3)
    for pruning in (Pruning(), Pruning(sparsity=0.5), Pruning(sparsity=0.5, rest="drop")):
        whole = best_plan(sizes, replace(request, earlier=Earlier()), pruning, "m")
        turn = best_plan(sizes, replace(request, earlier=Earlier(3900)), pruning, "m")
        assert turn.peak < whole.peak
        caches = [[row.bytes for row in plan.rows if row.name.startswith("KV cache")] for plan in (whole, turn)]
        assert caches[0] == caches[1]
        assert any(row.name == "statistics of the turns" for row in turn.rows) == turn.prunes
