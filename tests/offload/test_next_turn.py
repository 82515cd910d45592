"""The next turn of a conversation: its new tokens only, and the same as the sweep over the whole conversation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying
from tiny import CONTEXT, tiny_checkpoint, tiny_prompt
from tiny_types import HYBRIDS
from turns import FIRST, PAPER, SECOND, THIRD, WHOLE, assert_as_whole, told, turn

from griffin_offload import Engine
from griffin_offload.errors import OptionError, PromptError
from griffin_offload.memory.arena import padded
from griffin_offload.model import modules
from griffin_offload.model.recurrent import KEPT_STATES, KeepsStates
from griffin_offload.offload.earlier_turns import REWRITTEN
from griffin_offload.planning.rows import KEPT_STATISTICS
from griffin_offload.planning.turn import Turn

INDEXED = {"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"}  # an indexer keeps keys of its own
RECURRENT = ["qwen3_5_text", "falcon_h1", "jamba", "lfm3", "nemotron_h"]  # each another kind of cache


@pytest.fixture
def engine(case: Callable[[str], Case]) -> Engine:
    return Engine(case("llama").folder)


@pytest.fixture
def whole(case: Callable[[str], Case]) -> Engine:
    """Another engine with the same model, which keeps nothing."""
    return Engine(case("llama").folder)


def test_three_turns_of_every_type_are_as_the_sweep_over_the_whole_conversation(every: Case) -> None:
    engine, whole = Engine(every.folder), Engine(every.folder)
    ids = FIRST
    answer, _ = turn(engine, ids, **PAPER)
    refused = told(answer).why_not
    for more in (SECOND, THIRD):
        before, ids = len(ids), [*ids, *answer.token_ids, *more]
        answer = assert_as_whole(engine, whole, ids, **PAPER)
        assert told(answer) == (Turn(0, len(ids), refused) if refused else Turn(before, len(ids) - before))
    assert (refused == "its cache holds more than keys and values (DynamicIndexedLayer)") == (every.kind in INDEXED)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_three_turns_of_a_whole_hybrid_compute_their_new_tokens(case: Callable[[str], Case], kind: str) -> None:
    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    ids = FIRST
    answer, _ = turn(engine, ids, **WHOLE)
    for more in (SECOND, THIRD):
        covered, ids = len(ids) + len(answer.token_ids) - 1, [*ids, *answer.token_ids, *more]
        answer = assert_as_whole(engine, whole, ids, **WHOLE)
        assert told(answer) == Turn(covered, len(ids) - covered)
        assert answer.report.bytes_read < 5000  # rows of the embedding


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "rest": "int4"},
        {"sparsity": 0.5, "rest": "int8", "resident_dtype": "int8"},
        {"sparsity": 0.0, "resident_dtype": "int4"},
        {"sparsity": 1.0, "rest": "drop"},
        {"sparsity": 0.5, "rest": "drop", "selection": "sampling", "fold": False},
        {"sparsity": (0.5, 0.0, 0.9), "rest": "drop", "fold": False},
    ],
)
def test_a_turn_with_any_format_and_selection(engine: Engine, whole: Engine, options: dict[str, Any]) -> None:
    first, _ = turn(engine, FIRST, **options)
    answer = assert_as_whole(engine, whole, [*FIRST, *first.token_ids, *SECOND], **options)
    assert told(answer).kept_tokens == len(FIRST)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "qwen2_moe"])
def test_copied_layers_and_static_steps_change_nothing(case: Callable[[str], Case], kind: str) -> None:
    engine, whole = copying(case(kind).folder), copying(case(kind).folder)
    first, _ = turn(engine, FIRST, **PAPER)
    ids = [*FIRST, *first.token_ids, *SECOND]
    assert told(assert_as_whole(engine, whole, ids, **PAPER)) == Turn(len(FIRST), len(ids) - len(FIRST))
    only_one = [*ids, 7]  # a pass over one token is no step of an answer
    assert told(assert_as_whole(engine, whole, only_one, **PAPER)).kept_tokens == len(ids)


@pytest.mark.parametrize("make", [Engine, copying])
def test_the_whole_model_in_memory_reads_nothing_and_keeps_its_own_tokens(
    case: Callable[[str], Case], make: Callable[[Path], Engine]
) -> None:
    folder = case("gemma").folder
    engine, whole = make(folder), make(folder)
    first, _ = turn(engine, FIRST, **WHOLE)
    assert first.report.bytes_read > 100_000
    ids = [*FIRST, *first.token_ids, *SECOND]
    answer = assert_as_whole(engine, whole, ids, **WHOLE)
    covered = len(FIRST) + len(first.token_ids) - 1  # the last token of an answer has not been computed
    assert told(answer) == Turn(covered, len(ids) - covered)
    assert answer.report.bytes_read < 2000  # /proc tells of it


def test_only_the_feed_forward_blocks_are_read_again(case: Callable[[str], Case]) -> None:
    engine = Engine(case("gemma").folder)
    first, _ = turn(engine, FIRST, **PAPER)
    second, _ = turn(engine, [*FIRST, *first.token_ids, *SECOND], **PAPER)
    blocks = sum(layer.feed_forward(layer.whole) for layer in engine.sizes.layers)
    assert blocks * 0.98 < second.report.bytes_read < blocks + 2000


def test_one_set_of_statistics_is_kept_for_each_point(engine: Engine) -> None:
    ids = FIRST
    for number in range(4):
        answer, _ = turn(engine, ids, **PAPER)
        ids = [*ids, *answer.token_ids, *tiny_prompt(20, seed=number)[1:]]
    assert len(engine.resident.turns._statistics) == KEPT_STATISTICS


# Going back


def test_an_earlier_prompt_again(engine: Engine, whole: Engine) -> None:
    first, _ = turn(engine, FIRST, **PAPER)
    second = [*FIRST, *first.token_ids, *SECOND]
    turn(engine, second, **PAPER)
    shorter = second[:-3]
    assert told(assert_as_whole(engine, whole, shorter, **PAPER)) == Turn(len(second) - REWRITTEN, REWRITTEN - 3)
    other = [*FIRST, *first.token_ids[:3], *THIRD]
    assert told(assert_as_whole(engine, whole, other, **PAPER)).kept_tokens == len(FIRST)
    assert told(assert_as_whole(engine, whole, FIRST, **PAPER)) == Turn(len(FIRST) - REWRITTEN, REWRITTEN)


def test_a_template_that_rewrites_how_the_answer_began(engine: Engine, whole: Engine) -> None:
    turn(engine, FIRST, **PAPER)
    ids = [*FIRST[:-3], *SECOND, *THIRD]
    point = len(FIRST) - REWRITTEN
    assert told(assert_as_whole(engine, whole, ids, **PAPER)) == Turn(point, len(ids) - point)


def test_a_template_that_rewrites_an_answer_of_the_whole_model(engine: Engine, whole: Engine) -> None:
    first, _ = turn(engine, FIRST, **WHOLE)
    ids = [*FIRST, *first.token_ids[:3], *SECOND]
    assert told(assert_as_whole(engine, whole, ids, **WHOLE)) == Turn(len(FIRST) + 3, len(SECOND))


@pytest.mark.parametrize("options", [PAPER, WHOLE])
def test_another_conversation_starts_again(engine: Engine, whole: Engine, options: dict[str, Any]) -> None:
    turn(engine, FIRST, **options)
    other = [5, *FIRST]
    assert told(assert_as_whole(engine, whole, other, **options)) == Turn(
        0, 41, "what is kept of it begins differently"
    )


def test_other_runs_between_two_turns_take_the_memory(engine: Engine) -> None:
    for other in (
        lambda: engine.generate(FIRST, max_new_tokens=1, **PAPER),
        lambda: engine.generate_batch([FIRST, SECOND], per_prompt=True, max_new_tokens=1, **PAPER),
        lambda: engine.sweep(FIRST, sparsity=0.5),
        engine.unload,
    ):
        turn(engine, FIRST, **PAPER)
        other()
        assert engine.resident.turns.cache is None
        assert told(turn(engine, FIRST, **PAPER)[0]) == Turn(0, len(FIRST))


@pytest.mark.parametrize("options", [PAPER, WHOLE])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_state_goes_back_to_the_points_where_it_was_kept(
    case: Callable[[str], Case], kind: str, options: dict[str, Any]
) -> None:
    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    first, _ = turn(engine, FIRST, **options)
    second = [*FIRST, *first.token_ids, *SECOND]
    turn(engine, second, **options)
    undone = [*FIRST, *first.token_ids[:3], *THIRD]
    rewritten = [*FIRST[:-3], *THIRD]  # how the answer began
    for ids, point in ((undone, len(FIRST)), (rewritten, len(FIRST) - REWRITTEN)):
        answer = assert_as_whole(engine, whole, ids, **options)
        moved = kind == "lfm3" and len(told(answer).why_not) > 0  # a window of 16 tokens
        assert told(answer).kept_tokens == (0 if moved else point)


def test_the_copies_of_recurrent_states_are_in_the_plan(case: Callable[[str], Case]) -> None:
    engine, ids = Engine(case("qwen3_5_text").folder), FIRST
    for number in range(4):
        answer, _ = turn(engine, ids, **PAPER)
        ids = [*ids, *answer.token_ids, *tiny_prompt(20, seed=number)[1:]]
    layers = [layer for layer in engine.resident.turns.cache.layers if isinstance(layer, KeepsStates)]
    assert [len(layer.points) for layer in layers] == [KEPT_STATES + 1] * 2  # and the state itself
    states = [state for layer in layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    rows = {row.name: row.bytes for row in answer.report.plan.rows}
    assert rows["recurrent states"] == sum(padded(state.nbytes) for state in states)
    assert rows["recurrent states of the turns"] == KEPT_STATES * rows["recurrent states"]


# Other options


def test_another_sparsity_goes_on_with_the_conversation(engine: Engine, whole: Engine) -> None:
    first, _ = turn(engine, FIRST, **PAPER)
    ids = [*FIRST, *first.token_ids, *SECOND]
    assert told(assert_as_whole(engine, whole, ids, **PAPER | {"sparsity": 0.75})).kept_tokens == len(FIRST)
    ids += THIRD
    assert told(assert_as_whole(engine, whole, ids, **WHOLE)).kept_tokens == len(ids) - len(THIRD)
    ids += SECOND
    answer = assert_as_whole(engine, whole, ids, **PAPER)
    assert told(answer) == Turn(0, len(ids), "how it used its neurons is not known")


def test_a_sparsity_for_a_layer_that_was_whole_starts_again(engine: Engine, whole: Engine) -> None:
    turn(engine, FIRST, **PAPER | {"method": None, "rest": "drop", "fold": False, "sparsity": (0.5, 0.5, 0.0)})
    assert told(assert_as_whole(engine, whole, [*FIRST, *SECOND], **PAPER)).kept_tokens == 0


def test_a_prior_that_is_measured_between_two_turns_takes_the_memory(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "new", "llama", seed=5)  # whose prior no other test has measured
    engine, whole = Engine(folder), Engine(folder)
    first, _ = turn(engine, FIRST, sparsity=0.5, rest="int4")
    ids = [*FIRST, *first.token_ids, *SECOND]
    answer = assert_as_whole(engine, whole, ids, sparsity=0.5, rest="drop", fold=False)
    assert answer.report.prior
    assert told(answer) == Turn(0, len(ids))
    ids += THIRD
    answer = assert_as_whole(engine, whole, ids, sparsity=0.5, rest="drop", fold=False)
    assert answer.report.prior
    assert told(answer) == Turn(len(ids) - len(THIRD), len(THIRD))


@pytest.mark.parametrize("mode", ["token", "prompt"])
def test_skipped_blocks_keep_nothing(engine: Engine, mode: str) -> None:
    from griffin_offload.options import FfnSkip

    for _ in range(2):
        answer, _ = turn(engine, FIRST, skip=FfnSkip(0.3, mode, cold=(0, 0)))
        assert told(answer).why_not == "blocks are skipped by what the whole prompt shows"


def test_a_rotary_embedding_that_changes_keeps_nothing(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    engine = Engine(tiny_checkpoint(tmp_path / "dynamic", "llama", rope_parameters=rope))
    turn(engine, FIRST, **PAPER)
    assert "rotary" in told(turn(engine, [*FIRST, *SECOND], **PAPER)[0]).why_not


def test_several_prompts_are_no_conversation(engine: Engine) -> None:
    with pytest.raises(OptionError, match="one conversation continues at a time: 2 prompts"):
        engine.generate_batch([FIRST, SECOND], continues=True)


# Long passes, and windows


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mistral", "bloom", "olmo2", "gpt_oss", "qwen2_moe", "opt"])
def test_a_turn_in_pieces(case: Callable[[str], Case], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    first, _ = turn(engine, FIRST, **PAPER)
    ids = [*FIRST, *first.token_ids, *SECOND, *tiny_prompt(50, seed=3)[1:]]
    expected, expected_logits = turn(whole, ids, **PAPER)
    monkeypatch.setattr(modules, "PIECE", 11)
    answer, logits = turn(engine, ids, **PAPER)
    assert told(answer).kept_tokens == len(FIRST)
    assert answer.token_ids == expected.token_ids
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompt", [12, 20, 31, 40, 100])
@pytest.mark.parametrize("count", [2, 8, 14, 17, 18, 30])
def test_windows_move_on_behind_a_long_answer(case: Callable[[str], Case], prompt: int, count: int) -> None:
    """The window is 16 tokens: it is kept for as long an answer at least."""
    folder = case("mistral").folder
    engine, whole = Engine(folder), Engine(folder)
    before = tiny_prompt(prompt)
    first, _ = turn(engine, before, **PAPER, max_new_tokens=count)
    answer = assert_as_whole(engine, whole, [*before, *first.token_ids, *SECOND], **PAPER)
    if told(answer).why_not:
        assert told(answer).why_not == "its sliding windows have moved on"
        assert len(first.token_ids) > 16
    else:
        assert told(answer).kept_tokens == prompt


def test_a_conversation_beyond_the_context_is_refused_and_stays(engine: Engine, whole: Engine) -> None:
    first, _ = turn(engine, FIRST, **PAPER)
    with pytest.raises(PromptError, match="reads at most 256"):
        turn(engine, [*FIRST, *tiny_prompt(CONTEXT)], **PAPER)
    full = [*FIRST, *first.token_ids, *tiny_prompt(CONTEXT - len(FIRST) - len(first.token_ids) - 1)]
    answer = assert_as_whole(engine, whole, full, **PAPER)
    assert told(answer).kept_tokens == len(FIRST)
    assert len(answer.token_ids) == 1


def test_a_stream_continues_too(engine: Engine) -> None:
    for number, ids in enumerate((FIRST, [*FIRST, *SECOND])):
        with engine.stream(ids, continues=True, greedy=True, max_new_tokens=4, **PAPER) as stream:
            for _ in stream:
                if number:
                    break
        assert told(stream.answer).kept_tokens == (len(FIRST) if number else 0)
    assert stream.answer.finish_reason == "interrupted"
