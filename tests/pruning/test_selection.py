"""Selections other than top-k, a sparsity for each layer, and batches, against the obvious."""

from pathlib import Path

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.options import SCORES
from griffin_offload.pruning.selection import SELECTIONS, Selection, kept_neurons, magnitude, select_neurons
from griffin_offload.pruning.statistic import CHUNK, STATISTICS, neuron_statistic

PROMPT, NEW = tiny_prompt(), 12


def no_magnitude() -> Tensor:
    raise AssertionError("only magnitude asks for it")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("selection") / "m", "llama")


# Pure functions


@pytest.mark.parametrize(
    ("neurons", "sparsity", "kept"), [(96, 0, 96), (96, 0.5, 48), (97, 0.5, 48), (96, 0.999, 1), (96, 1, 0)]
)
def test_kept_neurons(neurons: int, sparsity: float, kept: int) -> None:
    assert kept_neurons(neurons, sparsity) == kept


def test_the_options_name_every_statistic() -> None:
    assert tuple(STATISTICS) == SCORES


@pytest.mark.parametrize("name", ["topk", "sampling", "topk-sampling", "random"])
@pytest.mark.parametrize("kept", [0, 1, 7, 20])
@pytest.mark.parametrize("shape", [(20,), (3, 20)])
def test_each_selection_gives_different_neurons_in_order(name: str, kept: int, shape: tuple[int, ...]) -> None:
    statistic = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    statistic[..., ::3] = 0
    chosen = Selection(name).choose(statistic, kept, 0, no_magnitude)
    assert chosen.shape == (*shape[:-1], kept)
    for row in chosen.reshape(1 if len(shape) == 1 else 3, kept):
        assert row.tolist() == sorted(set(row.tolist()))
    assert torch.equal(chosen, Selection(name).choose(statistic, kept, 0, no_magnitude))


def test_a_seed_and_a_layer_each_draw_anew() -> None:
    statistic = torch.ones(100)
    draws = [
        Selection("random", seed).choose(statistic, 50, layer, no_magnitude) for seed in (0, 1) for layer in (0, 1)
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_half_of_topk_sampling_are_the_largest() -> None:
    statistic = torch.arange(1.0, 101)
    chosen = set(Selection("topk-sampling").choose(statistic, 20, 0, no_magnitude).tolist())
    assert set(range(90, 100)) <= chosen
    assert chosen != set(range(80, 100))


def test_sampling_draws_by_s() -> None:
    """Ten neurons with s = 3 and ten with s = 1: of the first ones drawn, three in four are of the former."""
    statistic = torch.cat([torch.full((10,), 9.0), torch.full((10,), 1.0)])
    first = [int(Selection("sampling", seed).choose(statistic, 1, 0, no_magnitude)) for seed in range(2000)]
    assert sum(neuron < 10 for neuron in first) / 2000 == pytest.approx(0.75, abs=0.04)


def test_magnitude_is_the_product_of_norms() -> None:
    gate, up = torch.randn(5, 3), torch.randn(5, 3)
    expected = [float(g.norm() * u.norm()) for g, u in zip(gate, up, strict=True)]
    assert magnitude([gate, up]).tolist() == pytest.approx(expected)
    assert magnitude([up]).tolist() == pytest.approx([float(u.norm()) for u in up])


def test_an_unknown_selection() -> None:
    with pytest.raises(OptionError, match="'best' is not known; known: topk, sampling"):
        Selection("best")


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 3])
def test_a_weighted_statistic(tokens: int) -> None:
    z, weights = torch.randn(tokens, 7), torch.rand(tokens)
    expected = sum(w * (row / row.norm()).square() for w, row in zip(weights, z, strict=True))
    torch.testing.assert_close(neuron_statistic(z, weights), expected)
    torch.testing.assert_close(neuron_statistic(z, torch.ones(tokens)), neuron_statistic(z))


# In the sweep


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_magnitude_of_each_form_of_weights(tmp_path: Path, kind: str) -> None:
    """gate and up apart, in one matrix, transposed, of routed experts, and of those side by side."""
    engine = Engine(tiny_checkpoint(tmp_path / "m", kind), dtype="float32")
    engine.sweep(PROMPT, sparsity=0.5, rest="drop", selection="magnitude")
    chosen = [layer[0].clone() for layer in engine.kept_neurons()]
    engine.unload()
    engine.sweep(PROMPT, sparsity=0.0)
    for layer, experts in zip(engine.skeleton.modules, chosen, strict=True):
        by_hand = magnitude_by_hand(kind, layer)
        assert torch.equal(experts, select_neurons(by_hand, experts.shape[-1]))


def magnitude_by_hand(kind: str, layer: torch.nn.Module) -> Tensor:
    mlp = layer.get_submodule("mlp")
    if kind == "llama":
        return mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
    if kind == "phi3":
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return gate.norm(dim=1) * up.norm(dim=1)
    if kind == "gpt2":
        return mlp.c_fc.weight.norm(dim=0)
    weight = mlp.experts.gate_up_proj
    if kind == "mixtral":
        gate, up = weight.chunk(2, dim=1)
        return gate.norm(dim=2) * up.norm(dim=2)
    return weight[:, :, ::2].norm(dim=1) * weight[:, :, 1::2].norm(dim=1)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_is_what_is_kept(llama: Path, selection: str) -> None:
    """The answer is the masked model's, with the experts that the engine says it chose."""
    engine, model = Engine(llama), oracle.load(llama)
    answer = engine.generate(
        PROMPT,
        sparsity=0.5,
        rest="drop",
        fold=False,
        prior="off",
        selection=selection,
        seed=1,
        max_new_tokens=NEW,
        do_sample=False,
    ).token_ids
    experts = [layer[0] for layer in engine.kept_neurons()]
    assert answer == oracle.masked_generate(model, PROMPT, experts, NEW)[0]


def test_a_sparsity_for_each_layer(llama: Path) -> None:
    engine, model = Engine(llama), oracle.load(llama)
    shares = (0.0, 0.75, 1.0)
    answer = engine.generate(PROMPT, sparsity=shares, method="griffin", max_new_tokens=NEW, do_sample=False).token_ids
    experts = [oracle.experts(model, PROMPT, share)[i] for i, share in enumerate(shares)]
    assert [len(e) for e in experts] == [96, 24, 0]
    assert answer == oracle.masked_generate(model, PROMPT, experts, NEW)[0]
    with pytest.raises(OptionError, match="2 sparsities are given; the model has 3 layers"):
        engine.generate(PROMPT, sparsity=(0.5, 0.5))


@pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "gpt2", "mixtral", "gpt_oss", "falcon"])
def test_no_neuron_at_all(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    engine, model = Engine(folder, dtype="float32"), oracle.load(folder)
    answer = engine.generate(PROMPT, sparsity=1.0, method="griffin", max_new_tokens=NEW, do_sample=False).token_ids
    nothing = [e[..., :0] for e in oracle.experts(model, PROMPT, 0.5)]
    assert answer == oracle.masked_generate(model, PROMPT, nothing, NEW)[0]


@pytest.mark.parametrize("shares", [(0.25, 0.5, 0.75), (0.0, 1.0, 0.5), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_an_export_fills_up_layers_that_keep_less(tmp_path: Path, kind: str, shares: tuple[float, ...]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(tmp_path / "m", kind)
    Engine(folder).export(PROMPT, tmp_path / "out", prompt_text="x", fold=False, prior="off", sparsity=shares)
    small, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(facts.values()), facts
    model = oracle.load(folder)
    experts = [oracle.experts(model, PROMPT, share)[i] for i, share in enumerate(shares)]
    with torch.no_grad(), oracle._masked(model, experts):
        expected = model(torch.tensor([PROMPT])).logits
    with torch.no_grad():
        torch.testing.assert_close(small(torch.tensor([PROMPT])).logits, expected, rtol=1e-4, atol=1e-4)


# Batches


def test_in_a_batch_every_prompt_counts_the_same(llama: Path) -> None:
    """The experts are the largest of the sum of s² / S: a prompt three times as long has no more to say. The sum is
    told in tokens, as that of one prompt is."""
    prompts = [tiny_prompt(60), tiny_prompt(20, 1), tiny_prompt(33, 2)]
    engine, model = Engine(llama), oracle.load(llama)
    engine.generate_batch(prompts, sparsity=0.5, method="griffin", max_new_tokens=2, do_sample=False)
    each = [oracle.statistic(model, prompt, torch.float64) for prompt in prompts]
    for index, (layer, kept) in enumerate(zip(engine.resident.layers, engine.kept_neurons(), strict=True)):
        average = sum(map(len, prompts)) / len(prompts)
        pooled = sum(s[index].square() * average / len(p) for s, p in zip(each, prompts, strict=True))
        torch.testing.assert_close(layer.statistics[0].double(), pooled, rtol=1e-4, atol=1e-5)
        assert torch.equal(kept[0], select_neurons(pooled, 48))


def test_the_padding_changes_nothing(llama: Path) -> None:
    """Twice the same prompt, once beside a longer one: the same tokens each time, with all neurons."""
    engine = Engine(llama)
    short, long = tiny_prompt(10), tiny_prompt(70, 1)
    answers = [
        [a.token_ids for a in engine.generate_batch(p, sparsity=0, max_new_tokens=NEW, do_sample=False)]
        for p in ([short], [short, long], [long, short])
    ]
    assert answers[0][0] == answers[1][0] == answers[2][1]


def test_a_seed_gives_each_prompt_what_it_would_alone(llama: Path) -> None:
    engine = Engine(llama)
    prompts = [tiny_prompt(40), tiny_prompt(25, 1), tiny_prompt(31, 2)]
    options = {"sparsity": 0.5, "max_new_tokens": NEW, "do_sample": True, "seed": 5}
    alone = [engine.generate(prompt, **options).token_ids for prompt in prompts]
    together = engine.generate_batch(prompts, per_prompt=True, **options)
    assert [answer.token_ids for answer in together] == alone


def test_a_batch_is_read_once(llama: Path) -> None:
    engine = Engine(llama)
    prompts = [tiny_prompt(40), tiny_prompt(25, 1), tiny_prompt(31, 2)]
    for per_prompt in (True, False):
        engine.unload()
        report = engine.generate_batch(
            prompts, per_prompt=per_prompt, sparsity=0.5, max_new_tokens=4, no_fidelity=True
        )[0].report
        once = engine.checkpoint.bytes - engine.sizes.in_file  # of the embedding on disk, the tokens' rows are read
        assert once < report.bytes_read <= once + 0.06 * engine.checkpoint.bytes


def test_a_batch_plans_for_all_of_it(llama: Path) -> None:
    engine = Engine(llama)
    one = engine.plan(40, 10, sparsity=0.5)
    pooled, each = (
        engine.plan(40, 10, sparsity=0.5, sequences=8),
        engine.plan(40, 10, sparsity=0.5, sequences=8, per_prompt=True),
    )

    def row(plan: object, name: str) -> int:
        return next(r.bytes for r in plan.rows if r.name == name)  # type: ignore[attr-defined]

    for plan in (pooled, each):
        assert row(plan, "KV cache with the answer") == 8 * row(one, "KV cache with the answer")
    assert row(each, "kept neurons") == 8 * row(one, "kept neurons")
    assert row(pooled, "kept neurons") == row(one, "kept neurons")
