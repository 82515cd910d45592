"""Scores of many samples by one sweep, against a plain model in memory, and against a sweep for each sample."""

import shutil
from pathlib import Path

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.errors import NumericError, OptionError, PromptError
from griffin_offload.prior import Prior
from griffin_offload.static import Static

# Gate and up apart, sliding windows and tied, no gate and biases, (in, out) weights, gate and up in one, routed experts
# with and without a shared block, interleaved halves, recurrent layers.
KINDS = [
    "llama",
    "gemma3_text",
    "opt",
    "gpt2",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "gpt_oss",
    "jamba",
    "lfm2",
    "gemma4_text",
]
SAMPLES = [tiny_prompt(48, 1), tiny_prompt(20, 2), tiny_prompt(33, 3)]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("static") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("static") / "llama", "llama")


def flat(prior: Prior) -> list[Tensor]:
    """A score for each block, in the oracle's order."""
    return [score for layer in prior.scores for score in layer]


def test_one_sweep_over_many_is_the_sum_of_a_sweep_for_each(model: Path) -> None:
    engine = Engine(model)
    together = flat(engine.score_samples(Static(SAMPLES)))
    each = [flat(engine.score_samples(Static([ids]))) for ids in SAMPLES]
    assert len(together) == len(oracle.blocks(oracle.load(model)))
    for total, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(total, sum(parts), rtol=1e-6, atol=1e-7)


def test_every_byte_is_read_once(llama: Path) -> None:
    engine, seen = Engine(llama), []
    engine.score_samples(Static(SAMPLES), lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_griffin_score_is_the_papers(model: Path) -> None:
    whole = oracle.load(model)
    ours = flat(Engine(model).score_samples(Static(SAMPLES)))
    theirs = [oracle.statistic(whole, ids) for ids in SAMPLES]
    for place, score in enumerate(ours):
        torch.testing.assert_close(score, sum(s[place].square() for s in theirs), rtol=1e-4, atol=1e-5)


def test_the_wanda_score_is_norm_of_activations_times_norm_of_column(model: Path) -> None:
    """Of the weights as they lie in the modules, one neuron after the other."""
    whole = oracle.load(model)
    ours = flat(Engine(model).score_samples(Static(SAMPLES, "wanda")))
    seen = [oracle.activations(whole, ids) for ids in SAMPLES]
    for place, block in enumerate(oracle.blocks(whole)):
        of_samples = [z[place] for z in seen]
        if block.routed:
            slow = []
            for expert in range(len(block.module.down_proj)):
                down = block.module.down_proj[expert]
                down = down.T if getattr(block.module, "is_transposed", False) else down
                slow.append(wanda(torch.cat([z[expert] for z in of_samples]), down))
            expected = torch.stack(slow)
        else:
            down = block.module.weight
            z = torch.cat(of_samples)
            expected = wanda(z, down.T if type(block.module).__name__ == "Conv1D" else down)
        torch.testing.assert_close(ours[place], expected, rtol=1e-4, atol=1e-5)


def wanda(z: Tensor, down: Tensor) -> Tensor:
    """z (T, F), down (D, F) -> (F,)."""
    return torch.stack([(z[:, j].norm() * down[:, j].norm()) ** 2 for j in range(z.shape[1])]).detach()


def test_the_magnitude_score_needs_no_samples(llama: Path) -> None:
    whole = oracle.load(llama)
    ours = flat(Engine(llama).score_samples(Static(score="magnitude")))
    for layer, score in zip(oracle.decoder_layers(whole), ours, strict=True):
        expected = (layer.mlp.gate_proj.weight.norm(dim=1) * layer.mlp.up_proj.weight.norm(dim=1)) ** 2
        torch.testing.assert_close(score, expected.detach())


def test_the_random_score_is_its_seeds(llama: Path) -> None:
    engine = Engine(llama)
    one, again, other = (flat(engine.score_samples(Static(score="random", seed=seed))) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])


def test_a_prior_of_the_prompt_alone_gives_its_experts(model: Path) -> None:
    """Weight 1 is the prior's choice, weight 0 the prompt's own."""
    engine, prompt, other = Engine(model), tiny_prompt(48, 1), tiny_prompt(48, 7)
    prior = engine.score_samples(Static([other]))

    def answer(**options: object) -> list[list[int]]:
        engine.generate(prompt, sparsity=0.5, max_new_tokens=2, do_sample=False, **options)
        return [experts.tolist() for layer in engine._layers or [] for experts in layer.experts]

    own = answer()
    assert answer(prior=prior, prior_weight=0.0) == own
    theirs = answer(prior=prior, prior_weight=1.0)
    assert theirs == [experts.tolist() for experts in oracle.experts(oracle.load(model), other, 0.5)]
    assert theirs != own
    assert answer(prior=prior, prior_weight=0.5) not in (own, theirs)
    assert answer(prior=engine.score_samples(Static([prompt])), prior_weight=1.0) == own


def test_what_a_prior_is_of_is_in_the_report(llama: Path) -> None:
    engine = Engine(llama)
    prior = engine.score_samples(Static(SAMPLES))
    report = engine.generate(tiny_prompt(), sparsity=0.5, max_new_tokens=2, prior=prior).report
    facts = report.to_json()["prior"]
    assert facts["key"]
    del facts["key"]
    assert facts == {"model": "llama", "score": "griffin", "seed": 0, "samples": 3, "tokens": 101, "weight": 0.2}
    assert ("prior", "score griffin of 3 samples, weight 0.2") in report.rows()
    assert "prior" not in engine.generate(tiny_prompt(), sparsity=0.5, max_new_tokens=2).report.to_json()


def test_a_prior_where_it_cannot_act(llama: Path, tmp_path: Path) -> None:
    engine = Engine(llama)
    prior = engine.score_samples(Static(SAMPLES))
    with pytest.raises(OptionError, match="all of them stay"):
        engine.generate(tiny_prompt(), sparsity=0.0, prior=prior)
    with pytest.raises(OptionError, match="weight 2 is outside"):
        engine.generate(tiny_prompt(), sparsity=0.5, prior=prior, prior_weight=2)
    other = Engine(tiny_checkpoint(tmp_path / "other", "llama", intermediate_size=64))
    with pytest.raises(OptionError, match="the prior is of llama, whose layers are not those of"):
        other.generate(tiny_prompt(), sparsity=0.5, prior=prior)


def test_samples_that_make_no_scores(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="score 'best' is not known; known: griffin"):
        Static(SAMPLES, "best")
    with pytest.raises(PromptError, match="give at least one"):
        Static([], "wanda")
    with pytest.raises(OptionError, match="leave them out"):
        Static(SAMPLES, "random")
    with pytest.raises(PromptError, match="is empty"):
        Static([[3], []])
    with pytest.raises(PromptError, match=r"has 300 tokens; .* reads at most"):
        Engine(llama).score_samples(Static([[3] * 300]))


def test_weights_that_are_no_numbers(llama: Path, tmp_path: Path) -> None:
    """Seen also where no sample passes."""
    whole = oracle.load(llama)
    torch.nn.init.constant_(whole.model.layers[1].mlp.gate_proj.weight, float("inf"))
    whole.save_pretrained(shutil.copytree(llama, tmp_path / "broken"))
    engine = Engine(tmp_path / "broken")
    with pytest.raises(NumericError, match=r"the scores of model.layers.1.mlp.down_proj are NaN or infinite"):
        engine.score_samples(Static(score="magnitude"))
    with pytest.raises(NumericError, match="gate_proj"):
        engine.score_samples(Static(SAMPLES, "wanda"))
