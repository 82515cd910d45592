"""Static steps: the tokens of the model's own forwards, whatever the cache; recorded, replayed or given up rightly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying, greedy
from recordable import assert_recordable
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine, generation
from griffin_offload.errors import OptionError
from griffin_offload.memory.capture import Capture
from griffin_offload.model import static_step
from griffin_offload.model.static_cache import Ring
from griffin_offload.model.static_step import buckets, static_decoding
from griffin_offload.options import FfnSkip

NEW = 40  # more tokens than the windows of the tiny models


@pytest.fixture
def short_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_step, "SMALLEST", 16)


def answers(engine: Engine, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], Any]:
    made = engine.generate_batch(
        prompts, max_new_tokens=NEW, do_sample=False, **{"sparsity": 0.5, "rest": "drop", **options}
    )
    return [answer.token_ids for answer in made], made[0].report.steps


@pytest.mark.usefixtures("short_buckets")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gemma4_text", "opt", "bloom", "falcon-alibi"])
@pytest.mark.parametrize("tokens", [5, 30])
def test_tokens_and_logits_are_the_models_own_over_buckets_and_windows(
    case: Callable[[str], Case], kind: str, tokens: int
) -> None:
    folder, prompt = case(kind).folder, tiny_prompt(tokens)
    expected, logits = greedy(Engine(folder), prompt, 0.5, NEW)
    answer, found = greedy(copying(folder), prompt, 0.5, NEW)
    assert answer.token_ids == expected.token_ids
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    assert answer.report.steps.tokens == len(answer.token_ids) - 1


@pytest.mark.usefixtures("short_buckets")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"per_prompt": True}, {"resident_dtype": "int8"}, {"rest": "int4"}])
def test_a_batch_of_unequal_prompts(case: Callable[[str], Case], kind: str, options: dict[str, Any]) -> None:
    prompts = [tiny_prompt(n, n) for n in (5, 30, 17)]
    expected, none = answers(Engine(case(kind).folder), prompts, **options)
    found, steps = answers(copying(case(kind).folder), prompts, **options)
    assert none is None
    assert found == expected
    assert steps.tokens >= NEW - 1


def test_sampling_is_the_same_and_chat_like_turns_too(case: Callable[[str], Case]) -> None:
    plain, steps = Engine(case("llama").folder), copying(case("llama").folder)
    for seed in (1, 2):
        both = [
            engine.generate(
                tiny_prompt(9, seed), sparsity=0.5, method="griffin", max_new_tokens=12, temperature=1.5, seed=seed
            ).token_ids
            for engine in (plain, steps)
        ]
        assert both[0] == both[1]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("mixtral", {}, "routed experts"),
        ("mpt", {}, "on the host"),
        ("jamba", {}, "its cache has layers of another kind|routed"),
        ("llama", {"skip": FfnSkip(0.3)}, "ffn-skip by token"),
        ("llama", {"output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_what_has_no_static_step_is_decoded_as_ever_and_says_why(
    case: Callable[[str], Case], kind: str, options: dict[str, Any], reason: str
) -> None:
    found, steps = answers(copying(case(kind).folder), [tiny_prompt(12)], **options)
    expected, _ = answers(Engine(case(kind).folder), [tiny_prompt(12)], **options)
    assert found == expected
    assert pytest.approx(0) == steps.tokens
    assert steps.why_dynamic
    assert any(part in steps.why_dynamic for part in reason.split("|"))
    assert str(steps) == f"not static: {steps.why_dynamic}"


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_early_exit"])
def test_options_for_several_tokens_at_a_time_are_refused_before_anything_is_read(
    case: Callable[[str], Case], option: str
) -> None:
    for engine in (Engine(case("llama").folder), copying(case("llama").folder)):
        with pytest.raises(OptionError, match=option):
            answers(engine, [tiny_prompt(12)], **{option: 2})
        assert not engine.resident.layers


def test_a_cache_that_steps_have_taken_is_never_used_by_another_forward(case: Callable[[str], Case]) -> None:
    engine = copying(case("mistral").folder)

    def two_tokens(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 14:
            engine.skeleton.model.forward(input_ids=ids[:, -2:], past_key_values=caches[0])
        return scores

    caches: list[Any] = []
    make = type(engine.opened).kv_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.opened), "kv_cache", lambda *args: caches.append(make(*args)) or caches[0])
        with pytest.raises(OptionError, match="several tokens at a time"):
            answers(engine, [tiny_prompt(12)], logits_processor=[two_tokens])


def test_rotary_embeddings_that_change_with_the_length_are_not_static(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny_checkpoint(tmp_path / "m", "llama", rope_parameters=rope)
    assert "rotary" in answers(copying(folder), [tiny_prompt(12)])[1].why_dynamic


def test_buckets_double_and_end_at_the_room() -> None:
    assert buckets(100) == [100]
    assert buckets(256) == [256]
    assert buckets(257) == [256, 257]
    assert buckets(2000) == [256, 512, 1024, 2000]


@pytest.mark.parametrize("slots", [1, 5, 16])
def test_a_ring_knows_the_token_of_every_slot(slots: int) -> None:
    ring, held = Ring(slots, torch.device("cpu")), dict.fromkeys(range(slots), -1)
    for token in range(3 * slots):
        ring.move(torch.tensor(token))
        held[token % slots] = token
        assert ring.slot.tolist() == [token % slots]
        told = (ring.offset + torch.arange(slots)).tolist()
        for slot, number in held.items():
            assert told[slot] == number if number >= 0 else told[slot] > token


class Tape(Capture):
    """Records as on CUDA, but in Python: a recording runs the step, and its replay runs it again."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("cuda")
        self.log: list[str] = []
        self._fails = fails

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        self.log.append("check")
        yield

    def _record(self, step: Callable[[], None]) -> Any:
        if self._fails:
            raise RuntimeError(self._fails)
        self.log.append("record")
        tape = self

        class Recording:
            def replay(self) -> None:
                tape.log.append("replay")
                step()

        return Recording()


def test_a_step_is_computed_then_checked_then_recorded_then_replayed() -> None:
    tape, ran = Tape(), []
    for name in ("a", "a", "a", "a", "b", "b", "b", "a"):
        tape.run(name, lambda name=name: ran.append(name))  # type: ignore[misc]
    assert ran == ["a", "a", "a", "a", "b", "b", "b", "a"]
    assert tape.log == ["check", *["record", "replay", "replay"], "check", *["record", "replay"] * 2]
    assert tape.count == 3


def test_a_step_that_cannot_be_recorded_is_computed_and_the_reason_kept() -> None:
    tape, ran = Tape(fails="operation not permitted\n when stream is capturing"), []
    for _ in range(4):
        tape.run("a", lambda: ran.append(1))
    assert (len(ran), tape.count) == (4, 0)
    assert tape.failed == "operation not permitted when stream is capturing"


@pytest.mark.usefixtures("short_buckets")
def test_each_bucket_is_recorded_once_and_replayed(case: Callable[[str], Case]) -> None:
    engine, prompt = Engine(case("llama").folder), tiny_prompt(10)
    expected, _ = answers(engine, [prompt])
    tape = Tape()
    with static_decoding(engine.skeleton, tape) as step:
        found, _ = answers(engine, [prompt])
    assert found == expected
    lengths = len([length for length in buckets(10 + NEW) if length > 10])
    assert (step.steps.recordings, tape.log.count("record")) == (lengths, lengths)
    assert tape.log.count("replay") == step.steps.tokens - 2 * lengths  # the first two tokens of each were computed
    assert str(step.steps).startswith(f"CUDA graphs: {lengths}, prepared in ")


def test_a_token_is_handed_on_once_the_next_step_is_launched(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before steps are recorded: computing or recording one takes its time. Each token is told once, in order."""
    tape, plain = Tape(), Engine(case("llama").folder)
    monkeypatch.setattr(generation, "Capture", lambda device: tape)
    expected, _ = answers(plain, [tiny_prompt(12)])
    with copying(case("llama").folder).stream(
        tiny_prompt(12), sparsity=0.5, rest="drop", greedy=True, max_new_tokens=NEW
    ) as stream:
        told = [(token.id, tape.log.count("replay")) for token in stream if token.id is not None]
    assert [number for number, _ in told] == expected[0]
    launched = [replays for _, replays in told]
    assert launched == [0, 0, 0, *range(2, NEW - 2), NEW - 3]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
def test_an_answer_that_is_stopped_ends_with_the_token_that_was_told(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """The next step is under way then. The conversation goes on as if it were not."""
    monkeypatch.setattr(generation, "Capture", lambda device: Tape())
    options: dict[str, Any] = {"sparsity": 0.0, "greedy": True, "max_new_tokens": 16, "continues": True}
    found = []
    for engine in (Engine(case("llama").folder), copying(case("llama").folder)):
        with engine.stream(tiny_prompt(12), **options) as stream:
            told = [next(stream).id for _ in range(tokens)]
        assert stream.answer.token_ids == told
        turn = [*tiny_prompt(12), *stream.answer.token_ids, *tiny_prompt(5, 1)]
        found.append((stream.answer.text, told, engine.generate(turn, **options).token_ids))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_share_one_program_and_give_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the backend that runs what torch has traced: inductor's own would take a minute on a busy machine."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    folder = tiny_checkpoint(tmp_path / "m", "llama", num_hidden_layers=4)
    expected, _ = answers(Engine(folder), [tiny_prompt(12)])
    counters.clear()
    engine = copying(folder)
    found, steps = answers(engine, [tiny_prompt(12)], compile=True)
    assert found == expected
    assert steps.compiled
    assert counters["stats"]["unique_graphs"] == 1
    refused = [({"resident_dtype": "int8"}, "quantized"), ({"per_prompt": True}, "neurons of its own")]
    for options, reason in [*refused, ({"sparsity": (0.1, 0.2, 0.5, 0.5)}, "different numbers")]:
        _, steps = answers(engine, [tiny_prompt(12), tiny_prompt(5)], compile=True, **options)
        assert not steps.compiled
        assert reason in steps.why_not_compiled


def test_without_a_compiler_the_layers_run_as_they_are(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no C compiler\nwas found")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    expected, _ = answers(Engine(case("llama").folder), [tiny_prompt(12)])
    engine = copying(case("llama").folder)
    for _ in range(2):
        found, steps = answers(engine, [tiny_prompt(12)], compile=True)
        assert found == expected
        assert (steps.compiled, steps.why_not_compiled) == (False, "not compiled: no C compiler was found")
    _, steps = answers(Engine(case("llama").folder), [tiny_prompt(12)], compile=True)
    assert str(steps) == "not static: nothing is compiled on cpu"


def test_the_check_that_a_step_can_be_recorded_finds_what_cannot(case: Callable[[str], Case]) -> None:
    for kind in ("mpt", "xglm"):
        engine = Engine(case(kind).folder)
        with static_decoding(engine.skeleton, Capture("cpu")) as step:
            answers(engine, [tiny_prompt(12)])
        with pytest.raises(RuntimeError, match=r"item|host"):
            assert_recordable(engine, step)


def test_the_plan_counts_recorded_steps(case: Callable[[str], Case]) -> None:
    rows = {row.name for row in copying(case("llama").folder).plan(10).rows}
    assert "recorded steps" in rows
    assert "recorded steps" not in {row.name for row in Engine(case("llama").folder).plan(10).rows}
