"""The fidelity meter against plain transformers: a full model, and one whose neurons are zeroed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from engines import copying
from tiny import tiny_checkpoint, tiny_prompt
from tiny_gguf import write_gguf

from griffin_offload import Engine
from griffin_offload.pruning.fidelity import Fidelity

AGAIN = 16  # tokens that are read again of a prompt of 48
GREEDY = {"max_new_tokens": 6, "greedy": True}


def slowly(case: Case, prompt: Sequence[int], kept: oracle.Experts, count: int = AGAIN) -> torch.Tensor:
    """Agreement, KL and acceptance (3,): the last tokens read by a masked model, behind the full model's cache."""
    truth, _ = oracle._forward(case.model, prompt, None, keep=count)
    _, cache = oracle._forward(case.model, prompt[:-count], None) if len(prompt) > count else (None, None)
    with oracle._masked(case.model, kept):
        logits, _ = oracle._forward(case.model, prompt[-count:], cache, keep=count)
    p, q = truth.double().softmax(-1), logits.double().softmax(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double()
    kl = (p * (p / q).log()).sum(-1)
    return torch.stack([agreement, kl, torch.minimum(p, q).sum(-1)]).mean(1)


def figures(fidelity: Fidelity | None) -> torch.Tensor:
    assert fidelity is not None
    assert not fidelity.why_not, fidelity.why_not
    return torch.tensor([fidelity.agreement, fidelity.kl, fidelity.acceptance], dtype=torch.float64)


def test_equals_the_slow_reference_for_every_type(every: Case) -> None:
    prompt = tiny_prompt()
    engine = Engine(every.folder, dtype="float32")
    with_meter = engine.generate(prompt, sparsity=0.5, method="griffin", **GREEDY)
    without = engine.generate(prompt, sparsity=0.5, method="griffin", no_fidelity=True, **GREEDY)
    assert with_meter.token_ids == without.token_ids
    assert without.report.fidelity is None
    found = with_meter.report.fidelity
    if found.why_not:
        assert "its cache holds more than keys and values" in found.why_not
        return
    assert found.tokens == AGAIN or any(engine.sizes.windows)
    expected = slowly(every, prompt, every.kept(prompt, 0.5), found.tokens)
    torch.testing.assert_close(figures(found), expected, rtol=0, atol=1e-4)


def test_a_batch_counts_no_padding(case: Any) -> None:
    """Prompts of one length and of others, one shorter than what is read again, share their neurons."""
    llama = case("llama")
    prompts = [tiny_prompt(48), tiny_prompt(31, 1), tiny_prompt(9, 2)]
    engine = Engine(llama.folder, dtype="float32")
    answers = engine.generate_batch(prompts, sparsity=0.5, method="griffin", **GREEDY)
    without = engine.generate_batch(prompts, sparsity=0.5, method="griffin", no_fidelity=True, **GREEDY)
    assert [a.token_ids for a in answers] == [a.token_ids for a in without]
    kept = [layer[0] for layer in engine.kept_neurons()]
    counts = [AGAIN, AGAIN, 9]
    each = [slowly(llama, prompt, kept, count) * count for prompt, count in zip(prompts, counts, strict=True)]
    assert answers[0].report.fidelity.tokens == sum(counts)
    torch.testing.assert_close(figures(answers[0].report.fidelity), sum(each) / sum(counts), rtol=0, atol=1e-4)


def test_prompts_with_neurons_of_their_own(case: Any) -> None:
    llama = case("llama")
    prompts = [tiny_prompt(48), tiny_prompt(31, 1)]
    engine = Engine(llama.folder, dtype="float32")
    answers = engine.generate_batch(prompts, sparsity=0.5, method="griffin", per_prompt=True, **GREEDY)
    alone = [engine.generate(prompt, sparsity=0.5, method="griffin", **GREEDY) for prompt in prompts]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    expected = sum(figures(a.report.fidelity) for a in alone) / 2
    torch.testing.assert_close(figures(answers[0].report.fidelity), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_static_steps_and_a_second_prompt(case: Any, kind: str) -> None:
    engine = copying(case(kind).folder, dtype="float32")
    for prompt in (tiny_prompt(), tiny_prompt(30, 1), tiny_prompt(1)):
        answer = engine.generate(prompt, sparsity=0.5, method="griffin", **GREEDY)
        assert answer.report.steps.tokens == len(answer.token_ids) - 1
        without = engine.generate(prompt, sparsity=0.5, method="griffin", no_fidelity=True, **GREEDY)
        assert answer.token_ids == without.token_ids
        found = answer.report.fidelity
        if len(prompt) == 1:
            assert str(found) == "not measured: one token tells too little"
            continue
        expected = slowly(case(kind), prompt, case(kind).kept(prompt, 0.5), found.tokens)
        torch.testing.assert_close(figures(found), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [16, 256])
def test_sliding_windows_long_past(tmp_path: Path, window: int) -> None:
    """A prompt that is longer than the room of its sliding layers, and an answer that is longer than their window."""
    folder = tiny_checkpoint(tmp_path / "m", "gemma3_text", sliding_window=window, max_position_embeddings=2048)
    prompt, model = tiny_prompt(600), Case("gemma3_text", folder)
    engine = Engine(folder, dtype="float32")
    answer = engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=40, greedy=True)
    assert answer.token_ids == model.answer(prompt, 0.5, 40)[0]
    found = answer.report.fidelity
    assert found.tokens == (7 if window == 16 else answer.report.plan.read_again)
    expected = slowly(model, prompt, model.kept(prompt, 0.5), found.tokens)
    torch.testing.assert_close(figures(found), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pruning", [{"sparsity": 0.5, "rest": "int4"}, {"sparsity": 0, "resident_dtype": "int8"}])
def test_quantized_residents_are_compared_with_the_full_model(case: Any, pruning: dict[str, Any]) -> None:
    engine, prompt = Engine(case("llama").folder, dtype="float32"), tiny_prompt()
    answer = engine.generate(prompt, **pruning, **GREEDY)
    found = answer.report.fidelity
    with torch.no_grad():  # the resident model, behind the full model's cache
        states = case("llama").model.model(torch.tensor([prompt])).last_hidden_state[:, -AGAIN:]
        truth = engine.skeleton.model.get_output_embeddings()(states)[0].float()  # the lm_head is int8 in the pass too
        _, cache = oracle._forward(case("llama").model, prompt[:-AGAIN], None)
        ids = torch.tensor([prompt[-AGAIN:]])
        logits = engine.skeleton.model(ids, past_key_values=cache, use_cache=True).logits[0].float()
    p, q = truth.softmax(-1), logits.softmax(-1)
    assert found.acceptance == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), abs=1e-4)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-4)
    assert 0 < found.kl < 1


def test_where_nothing_is_measured(case: Any) -> None:
    engine, prompt = Engine(case("llama").folder, dtype="float32"), tiny_prompt()
    assert engine.generate(prompt, sparsity=0, **GREEDY).report.fidelity is None
    one = engine.generate(prompt, sparsity=0.5, max_new_tokens=1).report.fidelity
    assert "the answer has one token" in one.why_not


def test_the_plan_counts_it(case: Any) -> None:
    engine = Engine(case("llama").folder, dtype="float32")
    plan = engine.plan(200, 10, sparsity=0.5)
    rows = [row.name for row in plan.rows]
    assert "measuring the fidelity" in rows
    assert "measuring the fidelity" not in [row.name for row in engine.plan(200, 10, sparsity=0.5, fidelity=False).rows]
    assert "measuring the fidelity" not in [row.name for row in engine.plan(200, 10, sparsity=0).rows]


def test_a_budget_without_room_is_told(case: Any) -> None:
    engine, prompt = Engine(case("llama").folder, dtype="float32"), tiny_prompt()
    plan = engine.plan(len(prompt), 6, sparsity=0.5, fidelity=False)
    with_meter = engine.plan(len(prompt), 6, sparsity=0.5)
    if with_meter.peak > plan.peak:
        engine.budget = plan.peak
        assert "no room" in engine.generate(prompt, sparsity=0.5, **GREEDY).report.fidelity.why_not


def test_a_gguf_file_in_place(tmp_path: Path, case: Any) -> None:
    file = write_gguf(case("llama").folder, tmp_path / "model.gguf")
    found = (
        Engine(file, dtype="float32").generate(tiny_prompt(), sparsity=0.5, method="griffin", **GREEDY).report.fidelity
    )
    expected = slowly(case("llama"), tiny_prompt(), case("llama").kept(tiny_prompt(), 0.5))
    torch.testing.assert_close(figures(found), expected, rtol=0, atol=1e-4)


def test_little_is_kept_and_the_report_says_what_helps(case: Any) -> None:
    engine, prompt = Engine(case("llama").folder, dtype="float32"), tiny_prompt()
    report = engine.generate(prompt, sparsity=0.9, method="griffin", **GREEDY).report
    assert report.fidelity.is_low
    helps = "it fits with --rest int4 without --method griffin, or with --sparsity 0"
    assert report.warning == f"the answer may be far from the full model's; {helps}"
    assert report.to_json()["fidelity"]["warning"] == report.warning
    rows = dict(report.rows())
    assert rows["warning"] == report.warning
    assert rows["fidelity"] == f"keeps {report.fidelity.kept:.2f} of the full model's choices on this prompt"
    good = engine.generate(prompt, sparsity=0.1, rest="int8", **GREEDY).report
    assert good.warning is None
    assert "warning" not in dict(good.rows())
