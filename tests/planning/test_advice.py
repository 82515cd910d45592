"""What would keep more of the full model: every suggestion fits, and keeps more."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint

from griffin_offload import Engine, Pruning
from griffin_offload.planning.plan import Plan
from griffin_offload.units import MIB, parse_bytes

WITHOUT_METHOD = " without --method griffin"
SIZES = {"hidden_size": 768, "intermediate_size": 6144, "num_hidden_layers": 16, "vocab_size": 300}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_checkpoint(tmp_path_factory.mktemp("advice") / "m", "llama", dtype=torch.bfloat16, **SIZES))


def helps(engine: Engine, plan: Plan, pruning: Pruning) -> list[str]:
    return engine.opened.what_helps(plan, pruning)


def planned(engine: Engine, pruning: Pruning, words: str) -> Plan:
    """The plan with the options of a suggestion. Raises BudgetError where it does not fit."""
    if words.endswith(WITHOUT_METHOD):
        words, pruning = words.removesuffix(WITHOUT_METHOD), Pruning(pruning.sparsity)
    values = dict(re.findall(r"--([a-z-]+) (\S+)", words))
    opened = engine.opened
    if memory := values.pop("device-memory", None):
        opened = replace(opened, budget=parse_bytes(memory))
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in values.items()}
    if "sparsity" in given:
        given["sparsity"] = float(given["sparsity"])
    return opened.plan(40, 10, replace(pruning, **given), fidelity=True)


CHOICES = [
    *(Pruning(0.5), Pruning(0.5, rest="drop"), Pruning(0.5, method="griffin"), Pruning(0.75, "int8")),
    *(Pruning(0.75, "int8", "drop"), Pruning(0.5, "int4"), Pruning(0.5, "int4", "drop"), Pruning(0.0, "int4")),
]


@pytest.mark.parametrize("pruning", CHOICES)
def test_every_suggestion_fits_and_keeps_more(engine: Engine, pruning: Pruning) -> None:
    engine.budget = 2**40
    plan = engine.plan(40, 10, pruning)
    whole = ["--sparsity 0"] if pruning.sparsity else []
    whole += ["--resident-dtype bfloat16"] if pruning.resident_dtype else []
    in_int4 = ["--rest int4" + (WITHOUT_METHOD if pruning.method else "")] if plan.rest == "drop" else []
    assert helps(engine, plan, pruning) == [*in_int4, " ".join(whole)]
    seen = set()
    for budget in range(plan.peak, plan.peak + 300 * MIB, 10 * MIB):
        engine.budget = budget
        found = helps(engine, engine.plan(40, 10, pruning), pruning)
        assert found
        for words in found:
            better = planned(engine, pruning, words)
            assert better.resident_bytes != plan.resident_bytes
            assert better.rest != "drop" or better.sparsity < plan.sparsity
            if "--rest" not in words and "--resident-dtype" not in words:
                assert better.sparsity < plan.sparsity or plan.sparsity == 0
        seen |= {re.sub(r"\S*\d\S*", "N", words) for words in found}
    assert len(seen) > 1


def test_without_room_for_more_it_says_how_much_is_enough(engine: Engine) -> None:
    pruning = Pruning(0.0, "int4")
    engine.budget = engine.plan(40, 10, pruning).peak
    (found,) = helps(engine, engine.plan(40, 10, pruning), pruning)
    assert re.fullmatch(r"--sparsity 0.5 --resident-dtype int8 --rest int4 --device-memory \d+MiB", found)


def test_of_what_was_chosen_to_fit_only_more_memory_keeps_more(engine: Engine) -> None:
    engine.budget = engine.plan(40, 10, Pruning(0.5, "int4")).peak
    plan = engine.plan(40, 10)
    (found,) = helps(engine, plan, Pruning())
    assert planned(engine, Pruning(), found).sparsity < plan.sparsity


def test_the_whole_model_needs_no_help(engine: Engine) -> None:
    engine.budget = 2**40
    assert helps(engine, engine.plan(40, 10, Pruning(0.0)), Pruning(0.0)) == []


def test_a_budget_without_room_for_the_measurement_leaves_it_out(engine: Engine) -> None:
    engine.budget = 2**40
    pruning = Pruning(0.5)
    tokens = 1, 3
    engine.budget = engine.opened.plan(*tokens, pruning).peak
    plan = engine.plan(*tokens, pruning)
    assert plan.fits
    measured = engine.opened.plan(*tokens, replace(pruning), fidelity=True)
    assert measured.read_again in (0, 1)
