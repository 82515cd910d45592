"""The prior that every model has without asking (griffin_offload.model_prior)."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine, model_prior
from griffin_offload.errors import BudgetError
from griffin_offload.evaluation.scoring.score import score
from griffin_offload.evaluation.scoring.variant import FULL, Variant
from griffin_offload.options import Pruning
from griffin_offload.pruning.calibration import Calibration
from griffin_offload.pruning.prior import TOKENS, load_prior, save_prior, weight_at
from griffin_offload.pruning.selection import select_neurons
from griffin_offload.pruning.shipped_text import shipped_samples

DROPPED: dict[str, Any] = {"sparsity": 0.5, "rest": "drop", "max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A model that nobody has measured."""
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    return Engine(tiny_checkpoint(tmp_path / "model", "llama", chat=True))


def stored(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "prior").glob("*"))


def kept(engine: Engine) -> list[list[int]]:
    return [neurons.tolist() for layer in engine.kept_neurons() for neurons in layer]


def expected(engine: Engine, scores: list[Tensor], prompts: list[list[int]], sparsity: float = 0.5) -> list[list[int]]:
    """By plain transformers: the largest of the prompts' statistic plus the prior's share, TOKENS times."""
    model = oracle.load(engine.path)
    found = []
    statistics = [[s.square() for s in oracle.statistic(model, ids)] for ids in prompts]
    average = sum(map(len, prompts)) / len(prompts)
    for layer, prior in enumerate(scores):
        sums = [of[layer] * average / len(ids) for of, ids in zip(statistics, prompts, strict=True)]
        mixed = sum(sums) + TOKENS * prior / prior.sum()
        found.append(select_neurons(mixed, int(len(prior) * (1 - sparsity))).tolist())
    return found


def test_the_first_answer_that_drops_neurons_measures_it_and_the_next_has_it(engine: Engine, tmp_path: Path) -> None:
    prompt = tiny_prompt()
    first = engine.generate(prompt, **DROPPED)
    neurons = kept(engine)
    facts = first.report.to_json()["prior"]
    assert facts["measured_s"] > 0
    assert facts["weight"] == pytest.approx(TOKENS / (TOKENS + len(prompt)))
    assert any("measured once" in value for name, value in first.report.rows() if name == "prior")
    (path,) = stored(tmp_path)
    before = path.stat().st_mtime_ns
    engine.unload()
    again = engine.generate(prompt, **DROPPED)
    assert "measured_s" not in again.report.to_json()["prior"]
    assert again.token_ids == first.token_ids
    assert kept(engine) == neurons
    assert path.stat().st_mtime_ns == before


def test_it_is_the_statistic_of_the_text_that_ships(engine: Engine, tmp_path: Path) -> None:
    prior = engine.prior()
    assert prior
    samples = [ids[: engine.context_length - 1] for ids in shipped_samples(engine.tokenizer, True)]
    again = engine.score_samples(Calibration(samples))
    assert all(map(torch.equal, sum(prior.scores, ()), sum(again.scores, ())))
    assert all(map(torch.equal, sum(prior.scores, ()), sum(load_prior(*stored(tmp_path)).scores, ())))


def test_it_counts_like_so_many_tokens_of_the_prompt(engine: Engine) -> None:
    prior = engine.prior()
    assert prior
    scores = [score for layer in prior.scores for score in layer]
    for prompt in (tiny_prompt(), tiny_prompt()[:3]):
        engine.generate(prompt, **DROPPED)
        assert kept(engine) == expected(engine, scores, [prompt])
    prompts = [tiny_prompt(), tiny_prompt()[:7]]
    engine.generate_batch(prompts, **DROPPED)
    assert kept(engine) == expected(engine, scores, prompts)
    assert weight_at(TOKENS) == 0.5


@pytest.mark.parametrize(
    "without", [{"prior": "off"}, {"prior": None}, {"rest": "int4"}, {"selection": "random"}, {"prior_weight": 0.0}]
)
def test_where_it_has_no_say_nothing_is_measured(engine: Engine, tmp_path: Path, without: dict[str, Any]) -> None:
    answer = engine.generate(tiny_prompt(), **{**DROPPED, **without})
    assert "prior" not in answer.report.to_json()
    assert not stored(tmp_path)


def test_the_papers_method_has_none(engine: Engine, tmp_path: Path) -> None:
    engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2)
    assert kept(engine) == [e.tolist() for e in oracle.experts(oracle.load(engine.path), tiny_prompt(), 0.5)]
    assert not stored(tmp_path)
    assert Pruning(0.5, method="griffin").prior == "off"


@pytest.mark.parametrize("fault", ["another text", "no file of ours", "another model"])
def test_what_is_stored_and_wrong_is_measured_again(engine: Engine, tmp_path: Path, fault: str) -> None:
    prior = engine.prior()
    assert prior
    (path,) = stored(tmp_path)
    if fault == "another text":
        save_prior(path, type(prior)(prior.scores, {**prior.facts, "text_sha256": "0"}))
    elif fault == "another model":
        save_prior(path, type(prior)(prior.scores[:-1], prior.facts))
    else:
        path.write_bytes(b"something")
    assert engine.opened.stored_prior() is None
    assert "measured_s" in engine.generate(tiny_prompt(), **DROPPED).report.to_json()["prior"]
    again = engine.opened.stored_prior()
    assert again
    assert all(map(torch.equal, sum(again.scores, ()), sum(prior.scores, ())))


def test_without_room_to_measure_it_the_prompt_chooses_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise BudgetError("too little")

    monkeypatch.setattr(model_prior, "score_samples", refuse)
    answer = engine.generate(tiny_prompt(), **DROPPED)
    assert "prior" not in answer.report.to_json()
    assert kept(engine) == [e.tolist() for e in oracle.experts(oracle.load(engine.path), tiny_prompt(), 0.5)]
    assert not stored(tmp_path)


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert engine.generate(tiny_prompt(), **DROPPED).report.to_json()["prior"]["measured_s"] > 0


def test_an_export_and_a_measurement_have_it_as_an_answer_has(engine: Engine, tmp_path: Path) -> None:
    prompt = tiny_prompt()
    engine.export(prompt, tmp_path / "out", prompt_text="x", sparsity=0.5)
    facts = json.loads((tmp_path / "out" / "griffin.json").read_text())
    assert facts["prior"]["weight"] == pytest.approx(weight_at(len(prompt)))
    engine.generate(prompt, **DROPPED)
    assert facts["experts"] == kept(engine)
    variants = [FULL, Variant(0.5, rest="drop"), Variant(0.5, rest="drop", prior="off")]
    assert [variant.label() for variant in variants] == ["full", "50% prior fold 0.3", "50% fold 0.3"]
    ((_, ours, plain),) = score(engine, [(prompt, prompt[:9])], variants)
    slow = engine.sweep(prompt, Pruning(0.5, rest="drop"), 9)
    with torch.no_grad():
        logits = engine.skeleton.model(torch.tensor([prompt[:8]]), past_key_values=slow.past_key_values).logits[0]
    found = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:9])[:, None])[:, 0]
    torch.testing.assert_close(ours.log_probability[1:], found, rtol=0, atol=1e-4)
    assert not torch.equal(ours.kl, plain.kl)
