"""CUDA graphs; skipped without CUDA. The same steps run on the CPU, unrecorded, in test_static_step.py."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from emulator import CARDS
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.model import static_step
from griffin_offload.model.static_step import buckets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
NEW = 40  # more tokens than the windows of the tiny models
# Every way of attention, of positions, and of embedding; the others of the table are variations of these.
KINDS = """llama mistral gemma2 gemma3_text gemma4_text qwen2 qwen3 phi phi3 opt gpt2 bloom falcon-alibi gptj
    gpt_neox stablelm starcoder2 minicpm3 olmo2 cohere2 granite smollm3 nemotron modernbert-decoder""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _short_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_step, "SMALLEST", 32)


def batch(engine: Engine, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], Any]:
    method = {} if "rest" in options else {"method": "griffin"}
    made = engine.generate_batch(prompts, sparsity=0.5, max_new_tokens=NEW, do_sample=False, **method, **options)
    return [answer.token_ids for answer in made], made[0].report.steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_recorded_for_each_bucket_and_gives_the_oracles_tokens(
    case: Callable[[str], Case], kind: str
) -> None:
    prompt = tiny_prompt(20)
    expected, _ = case(kind).answer(prompt, 0.5, NEW)
    engine = Engine(case(kind).folder, device="cuda", dtype="float32")
    for _ in range(2):  # the second answer has a cache of its own
        (found,), steps = batch(engine, [prompt])
        assert found == expected
        assert (steps.why_dynamic, steps.why_not_recorded) == ("", "")
        last = 20 + len(found) - 1
        assert steps.recordings >= len([length for length in buckets(20 + NEW) if length <= last])


def test_falcons_of_one_key_head_are_not_recorded_and_say_so(case: Callable[[str], Case]) -> None:
    """Their attention makes an index on the host. Those of several key heads are recorded."""
    prompt = tiny_prompt(20)
    expected, _ = case("falcon").answer(prompt, 0.5, NEW)
    (found,), steps = batch(Engine(case("falcon").folder, device="cuda", dtype="float32"), [prompt])
    assert found == expected
    assert steps.tokens == len(found) - 1
    assert "synchroniz" in steps.why_not_recorded


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"per_prompt": True}, {"resident_dtype": "int8"}, {"rest": "int4"}])
def test_batches_of_unequal_prompts(case: Callable[[str], Case], kind: str, options: dict[str, Any]) -> None:
    prompts = [tiny_prompt(n, n) for n in (5, 30, 17)]
    expected, _ = batch(Engine(case(kind).folder, device="cpu", dtype="float32"), prompts, **options)
    found, steps = batch(Engine(case(kind).folder, device="cuda", dtype="float32"), prompts, **options)
    assert found == expected
    assert steps.recordings
    assert not steps.why_not_recorded


def test_sampling_draws_the_same_tokens_from_graphs(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(case("llama").folder, device="cuda", dtype="float32")

    def sampled() -> Any:
        return engine.generate(
            tiny_prompt(9), sparsity=0.5, method="griffin", max_new_tokens=24, temperature=1.5, seed=3
        )

    graphs = sampled()
    monkeypatch.setattr(static_step.StaticStep, "takes", lambda self, arguments: False)
    assert sampled().token_ids == graphs.token_ids
    assert graphs.report.steps.recordings


def test_a_step_that_asks_for_a_number_is_not_recorded_and_says_so(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompt = Engine(case("llama").folder, device="cuda", dtype="float32"), tiny_prompt(20)
    expected, _ = batch(engine, [prompt])
    norm = engine.skeleton.model.model.norm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) if float(x.sum()) < 1e30 else x)
    found, steps = batch(engine, [prompt])
    assert found == expected
    assert steps.recordings == 0
    assert steps.why_not_recorded
    monkeypatch.undo()
    sampled = engine.generate(
        prompt, sparsity=0.5, method="griffin", max_new_tokens=8, temperature=1.5, seed=3
    )  # the device still works
    assert sampled.report.steps.recordings


@pytest.mark.skipif(CARDS > 0, reason="nothing compiles for an emulated card")
@pytest.mark.filterwarnings("ignore")  # the compiler's: of TF32, which float32 here does not use, and of its own parts
def test_layers_are_compiled_once_and_kept_on_disk(case: Callable[[str], Case]) -> None:
    engine, prompt = Engine(case("llama").folder, device="cuda", dtype="float32"), tiny_prompt(20)
    expected, _ = batch(engine, [prompt])
    found, first = batch(engine, [prompt], compile=True)
    again, second = batch(engine, [prompt], compile=True)
    assert found == again == expected
    assert first.compiled
    assert first.recordings
    assert second.preparing_s < first.preparing_s


@pytest.mark.skipif(CARDS > 0, reason="an emulated card has no speed")
def test_replaying_takes_less_time_than_computing(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt = Engine(case("llama").folder, device="cuda", dtype="float32"), tiny_prompt(20)

    def seconds() -> float:
        start = time.perf_counter()
        engine.generate(prompt, sparsity=0, max_new_tokens=200, min_new_tokens=200, do_sample=False)
        return time.perf_counter() - start

    seconds()
    graphs = min(seconds() for _ in range(3))
    monkeypatch.setattr(static_step.StaticStep, "takes", lambda self, arguments: False)
    assert graphs < min(seconds() for _ in range(3))
