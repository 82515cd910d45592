"""Answers that are exactly the full model's: drafted by what is resident, verified by what streams past it."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from engines import copying, reading_threads
from tiny import EOS_ID, tiny_checkpoint, tiny_prompt
from transformers import SynthIDTextWatermarkingConfig
from transformers.generation import utils

from griffin_offload import Engine
from griffin_offload.engine import Answer
from griffin_offload.errors import OptionError
from griffin_offload.model.kv_cache import why_no_crop
from griffin_offload.offload import drafter
from griffin_offload.offload.draft_length import DraftLength
from griffin_offload.options import FfnSkip
from griffin_offload.planning.lossless import MOST_DRAFTS, Lossless, best_rate

PROMPT, MORE = tiny_prompt(40), tiny_prompt(13, seed=1)[1:]
INT4 = {"sparsity": 0.5, "rest": "int4"}
DROPPED = {"sparsity": 0.5, "rest": "drop"}


@pytest.fixture
def engine(case: Callable[[str], Case]) -> Engine:
    return Engine(case("llama").folder)


@pytest.fixture
def drafts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts go on as far as they can: tiny models give no time to save."""
    monkeypatch.setattr(DraftLength, "goes_on", lambda *_: True)


def lossless(engine: Engine, ids: list[int] = PROMPT, **options: Any) -> Answer:
    return engine.generate(ids, **{"lossless": True, "greedy": True, "max_new_tokens": 24, **INT4, **options})


def told(answer: Answer) -> Lossless:
    assert answer.report.lossless
    assert answer.report.to_json()["lossless"] == answer.report.lossless.to_json()
    return answer.report.lossless


# The full model's own tokens


def test_every_type_answers_as_plain_transformers(every: Case, drafts_on: None) -> None:
    engine = Engine(every.folder)
    if why_no_crop(engine.opened.config) or engine.skeleton.model._is_stateful:
        with pytest.raises(OptionError, match=r"its cache holds more than keys and values|its state cannot go back"):
            lossless(engine)
        return
    expected, _ = every.answer(PROMPT, 0.0, 24)
    answer = lossless(engine, **DROPPED)
    assert answer.token_ids == expected
    done = told(answer)
    assert done.tokens == len(expected) - 1
    assert 0 < done.accepted < done.drafted
    assert answer.report.bytes_read > done.passes * done.pass_bytes


@pytest.mark.parametrize(
    "options",
    [
        INT4,
        {"sparsity": 1.0, "rest": "int4"},
        {"sparsity": 0.5, "rest": "int8"},
        {"sparsity": 0.0, "resident_dtype": "int4"},
        {"sparsity": 0.5, "resident_dtype": "int8", "rest": "int4"},
        {"sparsity": 0.5, "method": "griffin"},
        {"sparsity": 1.0, "rest": "drop"},
        {"sparsity": (0.5, 0.0, 0.9), "rest": "drop"},
    ],
)
@pytest.mark.parametrize("make", [Engine, copying])
def test_any_resident_model_drafts(
    case: Callable[[str], Case], make: Callable[[Path], Engine], options: dict[str, Any]
) -> None:
    tiny = case("llama")
    answer = make(tiny.folder).generate(PROMPT, lossless=True, greedy=True, max_new_tokens=24, **options)
    assert answer.token_ids == tiny.answer(PROMPT, 0.0, 24)[0]
    assert not answer.report.plan.precision.head, "the full model's logits come from the lm_head as it is"
    assert told(answer).drafted


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("prompt", [5, 14, 16, 40])
def test_windows_move_on_while_drafts_come_and_go(
    case: Callable[[str], Case], kind: str, prompt: int, drafts_on: None
) -> None:
    tiny, ids = case(kind), tiny_prompt(prompt)
    answer = lossless(Engine(tiny.folder), ids, max_new_tokens=60, **DROPPED)
    assert answer.token_ids == tiny.answer(ids, 0.0, 60)[0]


def test_a_text_that_repeats_is_looked_up(engine: Engine, drafts_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model repeats itself soon."""
    expected = engine.generate(PROMPT, sparsity=0.0, greedy=True, max_new_tokens=200)
    answer = lossless(engine, max_new_tokens=200)
    assert answer.token_ids == expected.token_ids
    assert told(answer).looked_up
    monkeypatch.setattr(drafter, "LOOKED_UP", 0)
    alone = lossless(engine, max_new_tokens=200)
    assert alone.token_ids == expected.token_ids
    assert not told(alone).looked_up


def test_what_stands_last_before_is_looked_up() -> None:
    text = torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 1, 2, 3])
    assert drafter._look_up(text, 2).tolist() == [5, 6]
    assert drafter._look_up(text, 99).tolist() == [5, 6, 7, 1, 2, 3]
    assert drafter._look_up(text, 0).tolist() == []
    assert drafter._look_up(text[:11], 9).tolist() == []
    assert drafter._look_up(text[:2], 9).tolist() == []


def test_penalties_and_other_processors(engine: Engine, drafts_on: None) -> None:
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "max_new_tokens": 40}
    expected = engine.generate(PROMPT, sparsity=0.0, greedy=True, **options)
    assert lossless(engine, **options).token_ids == expected.token_ids


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_answers(engine: Engine, count: int) -> None:
    answer = lossless(engine, max_new_tokens=count)
    assert answer.token_ids == engine.generate(PROMPT, sparsity=0.0, greedy=True, max_new_tokens=count).token_ids
    assert answer.finish_reason == "length"
    assert told(answer).tokens == count - 1


def test_stop_strings_among_accepted_drafts(engine: Engine, drafts_on: None) -> None:
    options: dict[str, Any] = {"greedy": True, "max_new_tokens": 24}
    whole = engine.generate(PROMPT, sparsity=0.0, **options)
    for begin in range(1, len(whole.text) - 2, 3):
        stop = whole.text[begin : begin + 3]
        expected = engine.generate(PROMPT, sparsity=0.0, stop_strings=[stop], **options)
        answer = lossless(engine, stop_strings=[stop])
        assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
        assert answer.finish_reason == expected.finish_reason


def test_an_end_among_accepted_drafts(engine: Engine, drafts_on: None) -> None:
    whole = engine.generate(PROMPT, sparsity=0.0, greedy=True, max_new_tokens=24).token_ids
    for end in whole[2:20:3]:
        answer = lossless(engine, eos_token_id=[EOS_ID, end])
        assert answer.token_ids == whole[: whole.index(end) + 1]


def test_a_prompt_that_fills_the_context(engine: Engine, drafts_on: None) -> None:
    ids = tiny_prompt(engine.context_length - 7)
    expected = engine.generate(ids, sparsity=0.0, greedy=True)
    assert lossless(engine, ids, max_new_tokens=256).token_ids == expected.token_ids


def test_the_whole_model_drafts_nothing(engine: Engine) -> None:
    answer = engine.generate(PROMPT, lossless=True, greedy=True, max_new_tokens=24)
    assert answer.token_ids == engine.generate(PROMPT, sparsity=0.0, greedy=True, max_new_tokens=24).token_ids
    assert told(answer).why_not == "the whole model is resident: nothing is drafted"


# Sampling


def chances(model: Any, ids: list[int], first: int) -> dict[tuple[int, ...], float]:
    """Of every three tokens that follow, among the `first` likeliest each time: their exact probability."""

    def after(text: list[int]) -> dict[int, float]:
        with torch.no_grad():
            top = model(torch.tensor([text])).logits[0, -1].topk(first)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    found = {}
    for a, p in after(ids).items():
        for b, q in after([*ids, a]).items():
            found |= {(a, b, c): p * q * r for c, r in after([*ids, a, b]).items()}
    return found


def distance(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-squared, cells of less than five together in one."""
    total = sum(counts.values())
    large = {cell for cell, chance in expected.items() if chance * total >= 5}
    cells = [(counts[cell], expected[cell] * total) for cell in large]
    rest = sum(chance for cell, chance in expected.items() if cell not in large) * total
    cells += [(total - sum(seen for seen, _ in cells), rest)] if rest else []
    return sum((seen - mean) ** 2 / mean for seen, mean in cells)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("small") / "llama", "llama", num_hidden_layers=1)


def sampled(folder: Path, runs: int) -> Counter[tuple[int, ...]]:
    engine, ids = Engine(folder), tiny_prompt(6)
    options = {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "max_new_tokens": 3, "greedy": False}
    drawn = (lossless(engine, ids, seed=seed, **DROPPED, **options) for seed in range(runs))
    return Counter(tuple(answer.token_ids) for answer in drawn)


def test_sampling_keeps_the_full_models_distribution(small: Path, drafts_on: None) -> None:
    """26 degrees of freedom at most: 0.1 % of honest samples are farther than 54 from what is expected."""
    expected = chances(oracle.load(small), tiny_prompt(6), 3)
    assert distance(sampled(small, 400), expected) < 54


def test_a_wrong_rule_would_show(small: Path, drafts_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, where every draft is accepted: the distance tells."""
    rule = utils._speculative_sampling

    def takes_all(ids: Any, logits: Any, length: int, new: Any, **more: Any) -> Any:
        return rule(ids, torch.full_like(logits, -40.0), length, new, **more)  # as if no draft had been likely

    monkeypatch.setattr(utils, "_speculative_sampling", takes_all)
    expected = chances(oracle.load(small), tiny_prompt(6), 3)
    assert distance(sampled(small, 400), expected) > 54


def test_a_seed_repeats_the_answer(engine: Engine) -> None:
    first, second = (lossless(engine, greedy=False, seed=3, temperature=1.5) for _ in range(2))
    assert first.token_ids == second.token_ids


# Conversations, interruptions


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_turns_of_a_conversation(case: Callable[[str], Case], kind: str, drafts_on: None) -> None:
    tiny = case(kind)
    engine, ids = Engine(tiny.folder), PROMPT
    for _ in range(3):
        answer = lossless(engine, ids, continues=True, max_new_tokens=10)
        assert answer.token_ids == tiny.answer(ids, 0.0, 10)[0]
        ids = [*ids, *answer.token_ids, *MORE]
    assert answer.report.turn
    assert answer.report.turn.kept_tokens


def test_another_answer_to_the_same_prompt(engine: Engine, case: Callable[[str], Case], drafts_on: None) -> None:
    expected = case("llama").answer(PROMPT, 0.0, 24)[0]
    for _ in range(2):
        again = lossless(engine, continues=True)
        assert again.token_ids == expected
    assert again.report.turn
    assert again.report.turn.computed_tokens == 0
    assert engine.generate(PROMPT, sparsity=0.5, method="griffin", greedy=True, max_new_tokens=24, continues=True)
    assert lossless(engine, continues=True).token_ids == expected


@pytest.mark.parametrize("forwards", range(2, 30, 3))
def test_interrupted_anywhere_the_engine_goes_on(case: Callable[[str], Case], forwards: int, drafts_on: None) -> None:
    """Among the forwards of a layer are the prompt's, drafts' and passes'."""
    tiny = case("llama")
    engine = Engine(tiny.folder)
    count = 0

    def interrupt(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == forwards:
            raise KeyboardInterrupt

    handle = engine.skeleton.modules[1].register_forward_hook(interrupt)
    first = lossless(engine, continues=True)
    handle.remove()
    assert first.finish_reason == "interrupted"
    expected = tiny.answer(PROMPT, 0.0, 24)[0]
    assert first.token_ids == expected[: len(first.token_ids)]
    assert not reading_threads()
    ids = [*PROMPT, *first.token_ids, *MORE]
    assert lossless(engine, ids, continues=True).token_ids == tiny.answer(ids, 0.0, 24)[0]
    assert "_get_candidate_generator" not in vars(engine.skeleton.model)


def test_a_stream_that_is_closed(engine: Engine, drafts_on: None) -> None:
    expected = engine.generate(PROMPT, sparsity=0.0, greedy=True, max_new_tokens=24).token_ids
    with engine.stream(PROMPT, lossless=True, greedy=True, max_new_tokens=24, **INT4) as stream:
        tokens = [next(stream).id for _ in range(7)]
    assert tokens == expected[:7]
    assert stream.answer.finish_reason == "interrupted"
    assert lossless(engine).token_ids == expected


# What is refused


@pytest.mark.parametrize(
    ("options", "why"),
    [({"skip": FfnSkip(0.3)}, "ffn-skip leaves blocks out"), ({"num_beams": 2}, "beam")],
)
def test_options_that_go_with_no_drafts(engine: Engine, options: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        lossless(engine, **{**INT4, **options})


def test_outputs_of_every_pass_are_not_kept(engine: Engine, drafts_on: None) -> None:
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True}
    assert lossless(engine, **more).token_ids == lossless(engine).token_ids


def test_a_watermark_with_a_state_is_refused(engine: Engine) -> None:
    with pytest.raises(OptionError, match="SynthID's watermark"):
        lossless(engine, watermarking_config=SynthIDTextWatermarkingConfig(keys=[654, 400], ngram_len=5))


def test_an_end_of_its_own_as_the_last_token_is_an_end(engine: Engine) -> None:
    last = lossless(engine).token_ids[-1]
    if last not in lossless(engine).token_ids[:-1]:
        assert lossless(engine, eos_token_id=last).finish_reason == "stop"


def test_several_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(OptionError, match="one prompt at a time: 2 are given"):
        engine.generate_batch([PROMPT, MORE], lossless=True)


def test_a_rotary_embedding_that_changes_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(OptionError, match="rotary embedding changes"):
        lossless(Engine(tiny_checkpoint(tmp_path / "dynamic", "llama", rope_parameters=rope)))


# How long to draft


def test_the_best_rate_is_that_of_the_best_number_of_drafts() -> None:
    def rate(drafts: int) -> float:
        tokens = (1 - 0.9 ** (drafts + 1)) / (1 - 0.9)
        return tokens / (drafts * 0.03 + 1.2)

    assert best_rate(0.9, 0.03, 1.2, 32) == pytest.approx(max(rate(drafts) for drafts in range(33)))


def rounds(length: DraftLength, acceptance: float) -> Iterator[int]:
    for _ in range(40):
        drafts = 1
        while drafts < MOST_DRAFTS and length.goes_on(acceptance**drafts):
            drafts += 1
        yield drafts


@pytest.mark.parametrize(("acceptance", "draft_s", "pass_s"), [(0.97, 0.03, 1.2), (0.7, 0.05, 0.5), (0.9, 0.1, 0.1)])
def test_drafting_stops_where_a_fixed_number_would_be_best(acceptance: float, draft_s: float, pass_s: float) -> None:
    length = DraftLength(MOST_DRAFTS, acceptance, draft_s, pass_s)

    def rate(drafts: int) -> float:
        tokens = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
        return tokens / (drafts * draft_s + pass_s)

    best = max(range(1, MOST_DRAFTS + 1), key=rate)
    assert abs(next(rounds(length, acceptance)) - best) <= 1


def test_it_learns_how_often_drafts_of_a_probability_are_accepted() -> None:
    length = DraftLength(MOST_DRAFTS, 0.97, 0.03, 1.2)
    before, sure = length.acceptance(0.6), length.acceptance(0.995)
    for _ in range(50):
        length.learn([0.995, 0.6], accepted=1, draft_s=0.06, pass_s=1.2)
    assert length.acceptance(0.6) < before / 5
    assert length.acceptance(0.995) > sure
    assert length.rate < DraftLength(MOST_DRAFTS, 0.97, 0.03, 1.2).rate


def test_what_is_reported_in_words() -> None:
    done = Lossless(passes=10, pass_bytes=10 * 2**30, drafted=200, accepted=180, draft_s=6.0, verify_s=10.0, close=2)
    assert done.tokens == 190
    assert done.bytes_per_token == pytest.approx(10 / 19 * 2**30)
    assert done.speedup == pytest.approx(19 * 10 / 16)
    assert "190 tokens by 10 passes (19.0 each); 180 of 200 drafts accepted" in str(done)
    assert "2 tokens were as good as tied" in str(done)
    assert str(Lossless()) == "one token, of the prompt pass"
