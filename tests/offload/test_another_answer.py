"""Another answer to the prompt of a turn: no pass, and nothing is read."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying
from turns import FIRST, PAPER, SECOND, THIRD, WHOLE, assert_as_whole, told, turn

from griffin_offload import Engine
from griffin_offload.offload.earlier_turns import REWRITTEN
from griffin_offload.planning.turn import Turn

INT4 = {"sparsity": 0.5, "rest": "int4", "resident_dtype": "int8"}


@pytest.fixture
def engine(case: Callable[[str], Case]) -> Engine:
    return Engine(case("llama").folder)


@pytest.fixture
def whole(case: Callable[[str], Case]) -> Engine:
    """Another engine with the same model, which keeps nothing."""
    return Engine(case("llama").folder)


@pytest.mark.parametrize("options", [PAPER, WHOLE, INT4])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2_moe", "gpt2", "lfm2", "falcon_h1"])
def test_another_answer_computes_and_reads_nothing(
    case: Callable[[str], Case], kind: str, options: dict[str, Any]
) -> None:
    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    first, _ = turn(engine, FIRST, **options)
    ids = [*FIRST, *first.token_ids, *SECOND]
    assert_as_whole(engine, whole, ids, **options)
    for count in (8, 12):  # with another room
        answer = assert_as_whole(engine, whole, ids, **options, max_new_tokens=count)
        assert told(answer) == Turn(len(ids), 0)
        assert answer.report.bytes_read < 5000  # rows of the embedding
    ids += [*answer.token_ids, *THIRD]
    assert told(assert_as_whole(engine, whole, ids, **options)).kept_tokens >= len(FIRST)


def test_another_answer_by_folded_neurons(engine: Engine) -> None:
    folded = {"sparsity": 0.5, "rest": "drop"}
    first, logits = turn(engine, FIRST, **folded)
    again, same = turn(engine, FIRST, **folded)
    assert told(again) == Turn(len(FIRST), 0)
    assert again.token_ids == first.token_ids
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-6)
    assert again.report.plan.fold == first.report.plan.fold
    assert first.report.plan.fold


def test_another_answer_by_sampling_is_another_one(engine: Engine) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, **PAPER}
    answers = [turn(engine, FIRST, seed=seed, **sampled)[0] for seed in (1, 2, 1)]
    assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids
    assert [told(answer).computed_tokens for answer in answers] == [len(FIRST), 0, 0]


def test_another_answer_keeps_the_fidelity_of_the_prompt(engine: Engine) -> None:
    first, _ = turn(engine, FIRST, **PAPER)
    again, _ = turn(engine, FIRST, **PAPER)
    without, _ = turn(engine, FIRST, **PAPER, no_fidelity=True)
    assert first.report.fidelity
    assert again.report.fidelity == replace(first.report.fidelity, seconds=0.0)
    assert without.report.fidelity is None


@pytest.mark.parametrize(
    "other", [{"sparsity": 0.75}, {"method": None, "rest": "int4"}, {"method": None, "rest": "drop", "fold": False}]
)
def test_another_answer_by_other_neurons_passes_again(engine: Engine, whole: Engine, other: dict[str, Any]) -> None:
    turn(engine, FIRST, **PAPER)
    assert told(assert_as_whole(engine, whole, FIRST, **PAPER | other)).computed_tokens == REWRITTEN
    assert told(assert_as_whole(engine, whole, FIRST, **PAPER)).computed_tokens == REWRITTEN
    assert told(assert_as_whole(engine, whole, FIRST, **PAPER)).computed_tokens == 0


def test_neurons_that_are_drawn_by_a_seed_are_drawn_again(engine: Engine, whole: Engine) -> None:
    drawn = {"sparsity": 0.5, "rest": "drop", "selection": "sampling", "fold": False}
    for seed in (1, 2):
        answer = assert_as_whole(engine, whole, FIRST, **drawn, seed=seed)
    assert told(answer).computed_tokens == REWRITTEN


def test_an_interrupted_pass_leaves_no_answer_to_repeat(engine: Engine, whole: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    first, _ = turn(engine, FIRST, **PAPER)
    with pytest.raises(KeyboardInterrupt):
        turn(engine, [*FIRST, *first.token_ids, *SECOND], **PAPER, on_layer=interrupt)
    assert told(assert_as_whole(engine, whole, FIRST, **PAPER)).computed_tokens == REWRITTEN


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_another_answer_behind_static_steps(case: Callable[[str], Case], kind: str) -> None:
    engine, whole = copying(case(kind).folder), copying(case(kind).folder)
    turn(engine, FIRST, **PAPER)
    for _ in range(2):
        assert told(assert_as_whole(engine, whole, FIRST, **PAPER)) == Turn(len(FIRST), 0)
