"""An answer in parts, between which the full model computes what was said and the neurons are chosen again."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
from cases import Case
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import OptionError

PROMPT, MORE = tiny_prompt(40), tiny_prompt(13, seed=1)[1:]
PAPER: dict[str, Any] = {"sparsity": 0.5, "method": "griffin", "greedy": True}


@pytest.fixture
def engine(case: Callable[[str], Case]) -> Engine:
    return Engine(case("llama").folder)


def expected(case: Case, every: int, count: int) -> list[int]:
    """The oracle's: each part from the neurons of the text so far, all of which the full model computed."""
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + count:
        kept = oracle.experts(case.model, ids, 0.5)
        ids += oracle.masked_generate(case.model, ids, kept, min(every, len(PROMPT) + count - len(ids)))[0]
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("every", [1, 5, 8, 24, 99])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen2_moe"])
def test_every_part_is_of_the_neurons_of_the_text_so_far(case: Callable[[str], Case], kind: str, every: int) -> None:
    answer = Engine(case(kind).folder).generate(PROMPT, refresh=every, max_new_tokens=24, **PAPER)
    assert answer.token_ids == expected(case(kind), every, 24)
    told = answer.report.refreshes
    assert told
    assert (told.every, told.count) == (every, -(-24 // every) - 1)
    assert answer.report.to_json()["refreshes"] == told.to_json()
    assert answer.report.tokens == 24


def test_the_text_is_streamed_as_one(engine: Engine) -> None:
    pieces: list[str] = []
    answer = engine.generate(PROMPT, refresh=3, max_new_tokens=24, on_text=pieces.append, **PAPER)
    assert "".join(pieces) == answer.text
    assert answer.prompt_token_ids == PROMPT
    with engine.stream(PROMPT, refresh=3, max_new_tokens=24, **PAPER) as stream:
        assert [token.id for token in stream if token.id is not None] == answer.token_ids


def test_it_stops_where_a_part_does(engine: Engine) -> None:
    whole = engine.generate(PROMPT, refresh=5, max_new_tokens=24, **PAPER)
    end = next(token for token in whole.token_ids[7:] if token not in whole.token_ids[:7])
    answer = engine.generate(PROMPT, refresh=5, max_new_tokens=24, eos_token_id=end, **PAPER)
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert answer.finish_reason == "stop"


def test_a_seed_repeats_the_answer_and_parts_draw_differently(engine: Engine) -> None:
    options = {**PAPER, "greedy": False, "seed": 1, "temperature": 1.5, "refresh": 6, "max_new_tokens": 24}
    first, second = (engine.generate(PROMPT, **options).token_ids for _ in range(2))
    assert first == second


def test_the_whole_model_is_refreshed_by_nothing(engine: Engine) -> None:
    answer = engine.generate(PROMPT, sparsity=0.0, greedy=True, refresh=5, max_new_tokens=24)
    assert answer.token_ids == engine.generate(PROMPT, sparsity=0.0, greedy=True, max_new_tokens=24).token_ids
    assert answer.report.refreshes
    assert answer.report.refreshes.count == 0
    assert "not once" in str(answer.report.refreshes)


def test_the_next_turn_goes_on(case: Callable[[str], Case], engine: Engine) -> None:
    first = engine.generate(PROMPT, refresh=8, max_new_tokens=24, continues=True, **PAPER)
    ids = [*PROMPT, *first.token_ids, *MORE]
    second = engine.generate(ids, max_new_tokens=8, continues=True, **PAPER)
    assert second.token_ids == case("llama").answer(ids, 0.5, 8)[0]
    assert second.report.turn
    assert second.report.turn.kept_tokens == len(PROMPT) + 16
    engine.generate(PROMPT, refresh=8, max_new_tokens=24, **PAPER)
    assert engine.resident.turns.cache is None


def test_an_interruption_ends_it(engine: Engine) -> None:
    count = 0

    def interrupt(text: str) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt

    answer = engine.generate(PROMPT, refresh=5, max_new_tokens=24, on_text=interrupt, **PAPER)
    assert answer.finish_reason == "interrupted"
    assert 5 < len(answer.token_ids) < 24


@pytest.mark.parametrize("every", [1, 3, 5, 6, 24])
def test_a_stop_text_is_found_across_parts_and_left_out(engine: Engine, every: int) -> None:
    whole = engine.generate(PROMPT, refresh=every, max_new_tokens=24, **PAPER)
    for begin in range(1, len(whole.text) - 3, 4):
        stop, pieces = whole.text[begin : begin + 3], list[str]()
        if "\ufffd" in stop:
            continue
        answer = engine.generate(PROMPT, refresh=every, max_new_tokens=24, stop=stop, on_text=pieces.append, **PAPER)
        assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("every", [4, 5, 6, 24])
def test_an_end_of_its_own_as_a_parts_last_token(engine: Engine, every: int) -> None:
    whole = engine.generate(PROMPT, refresh=every, max_new_tokens=24, **PAPER).token_ids
    for end in {whole[every - 1], whole[-1], whole[9]}:
        answer = engine.generate(PROMPT, refresh=every, max_new_tokens=24, eos_token_id=[end], **PAPER)
        assert answer.token_ids == whole[: whole.index(end) + 1]
        assert answer.finish_reason == "stop"


def test_a_least_length_is_of_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate(PROMPT, refresh=24, max_new_tokens=24, **PAPER).token_ids
    first = next(i for i in range(2, 24) if whole[i] not in whole[:i])
    options: dict[str, Any] = {"refresh": 4, "max_new_tokens": 24, "eos_token_id": whole[first], **PAPER}
    before = engine.generate(PROMPT, **options).token_ids
    assert len(before) < 15
    assert len(engine.generate(PROMPT, min_new_tokens=15, **options).token_ids) >= 15
    assert engine.generate(PROMPT, min_new_tokens=1, **options).token_ids == before


@pytest.mark.parametrize("forwards", range(2, 26, 4))
def test_interrupted_anywhere(engine: Engine, forwards: int) -> None:
    count = 0

    def interrupt(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == forwards:
            raise KeyboardInterrupt

    handle = engine.skeleton.modules[1].register_forward_hook(interrupt)
    answer = engine.generate(PROMPT, refresh=3, max_new_tokens=24, no_fidelity=True, **PAPER)
    handle.remove()
    assert answer.finish_reason == "interrupted"
    assert answer.token_ids
    assert engine.resident.turns.cache is None


def test_what_it_does_not_go_with(engine: Engine) -> None:
    with pytest.raises(OptionError, match="leave out refresh, or lossless"):
        engine.generate(PROMPT, refresh=5, lossless=True)
    with pytest.raises(OptionError, match="one prompt at a time: 2 are given"):
        engine.generate_batch([PROMPT, MORE], refresh=5)
    with pytest.raises(OptionError, match="forced_eos_token_id is of the whole"):
        engine.generate(PROMPT, refresh=5, forced_eos_token_id=5)
