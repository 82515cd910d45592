"""The oracle is right: against the paper's identities, transformers' own generate, and weights pruned by hand."""

from pathlib import Path

import oracle
import pytest
import torch
from safetensors import safe_open
from tiny import (
    CONTEXT,
    SPECIALS,
    UNSUPPORTED,
    VOCAB,
    text_paragraph,
    tiny_checkpoint,
    tiny_prompt,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PROMPT = tiny_prompt()
NEW = 24


@pytest.fixture(scope="module")
def model(tiny: Path) -> PreTrainedModel:
    return oracle.load(tiny)


# The tiny models are fit to test with.


def test_tiny_models_speak(model: PreTrainedModel) -> None:
    for kept in (None, oracle.experts(model, PROMPT, 0.5)):
        tokens, logits = oracle.masked_generate(model, PROMPT, kept, NEW)
        best, second = logits.topk(2).values.unbind(1)
        assert len(tokens) == NEW  # none ended early
        assert len(set(tokens)) >= 4
        assert min(tokens) >= len(SPECIALS)
        assert (best - second).min() > 3e-4  # no near ties, which rounding could turn
    assert oracle.margin(model, PROMPT, 0.5) > 1e-5


def test_tiny_models_have_no_default_parameter(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_ties(tmp_path: Path, tied: bool) -> None:
    model = oracle.load(tiny_checkpoint(tmp_path, "gemma3_text", tied=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118


def test_tiny_shards_and_dtype(tmp_path: Path) -> None:
    one = tiny_checkpoint(tmp_path / "one", "llama", dtype=torch.bfloat16)
    three = tiny_checkpoint(tmp_path / "three", "llama", dtype=torch.bfloat16, shards=3)
    assert [p.name for p in one.glob("*.safetensors*")] == ["model.safetensors"]
    assert len(list(three.glob("*.safetensors"))) == 3
    assert (three / "model.safetensors.index.json").is_file()
    assert AutoConfig.from_pretrained(three).dtype == torch.bfloat16
    weights = [oracle.load(folder, torch.bfloat16).state_dict() for folder in (one, three)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_tiny_seed_decides_the_weights(tmp_path: Path) -> None:
    a, b, c = (
        oracle.load(tiny_checkpoint(tmp_path / str(i), "qwen2", seed=seed)).model.norm.weight
        for i, seed in enumerate([0, 0, 1])
    )
    assert a.equal(b)
    assert not a.equal(c)


@pytest.mark.parametrize("model_type", [*UNSUPPORTED])
def test_unsupported_checkpoints_are_whole(tmp_path: Path, model_type: str) -> None:
    tokens, _ = oracle.full_generate(oracle.load(tiny_checkpoint(tmp_path, model_type)), PROMPT, 4)
    assert len(tokens) == 4


@pytest.mark.parametrize("text", ["", "  two  spaces\n\ttab", "naïve café — 日本語 🦅", text_paragraph(), "a b<|end|>"])
def test_tokenizer_round_trips(tmp_path: Path, text: str) -> None:
    tiny_tokenizer(chat=True).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == "<s>" + text
    assert max(ids) < VOCAB


def test_tokenizer_next_to_every_model(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)  # transformers chooses its class by the model type
    assert len(tokenizer) == VOCAB
    assert all(tokenizer.decode([i]) for i in range(VOCAB))
    assert tokenizer.decode(tokenizer("Hello,  Wörld").input_ids, skip_special_tokens=True) == "Hello,  Wörld"
    assert tokenizer.chat_template is None
    assert tokenizer.model_max_length == CONTEXT


def test_chat_template(tmp_path: Path) -> None:
    tiny_tokenizer(chat=True).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|start|>user\nHi<|end|>\n<|start|>assistant\n"


# The oracle.


def test_down_projections_give_back_the_hidden_size(model: PreTrainedModel) -> None:
    downs = oracle.down_projections(model)
    assert len(downs) == model.config.num_hidden_layers
    width = getattr(model.config, "ffn_dim", None) or model.config.intermediate_size
    assert {(d.in_features, d.out_features) for d in downs} == {(width, model.config.hidden_size)}


def test_z_is_the_input_of_down(model: PreTrainedModel) -> None:
    for z in oracle.activations(model, PROMPT):
        assert z.shape[0] == len(PROMPT)
        assert (z.abs().amax(dim=0) > 0).float().mean() > 0.9  # most neurons take part


@pytest.mark.parametrize("tokens", [1, 2, 48])
def test_squares_sum_to_the_number_of_tokens(model: PreTrainedModel, tokens: int) -> None:
    for s in oracle.statistic(model, tiny_prompt(tokens)):
        assert s.square().sum().item() == pytest.approx(tokens, rel=1e-5)


def test_statistic_by_the_formula_in_float64(model: PreTrainedModel) -> None:
    for z, s in zip(oracle.activations(model, PROMPT), oracle.statistic(model, PROMPT), strict=True):
        rows = [[float(x) for x in row] for row in z]
        total = [0.0] * len(rows[0])
        for row in rows:
            square = sum(x * x for x in row)
            total = [t + x * x / square for t, x in zip(total, row, strict=True)]
        torch.testing.assert_close(s.double(), torch.tensor(total).double().sqrt(), rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_counts_for_nothing() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert oracle._column_norms(z).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_experts_are_the_largest(model: PreTrainedModel, sparsity: float) -> None:
    for s, kept in zip(oracle.statistic(model, PROMPT), oracle.experts(model, PROMPT, sparsity), strict=True):
        assert len(kept) == int(len(s) * (1 - sparsity))
        assert kept.tolist() == sorted(set(kept.tolist()))
        rest = torch.ones(len(s), dtype=torch.bool)
        rest[kept] = False
        assert sparsity == 0 or s[kept].min() > s[rest].max()


def test_of_equals_the_first_are_kept() -> None:
    s = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 3.0])
    assert oracle._largest(s, 0.5).tolist() == [0, 1, 5]
    assert oracle._largest(s, 0.9).tolist() == []


def test_margin_is_the_tightest_gap(model: PreTrainedModel) -> None:
    gaps = []
    for s in oracle.statistic(model, PROMPT):
        kept = oracle._largest(s, 0.5)
        rest = [x for i, x in enumerate(s.tolist()) if i not in set(kept.tolist())]
        gaps.append(1 - max(rest) / s[kept].min().item())
    assert oracle.margin(model, PROMPT, 0.5) == pytest.approx(min(gaps), rel=0.05, abs=1e-6)
    assert oracle.margin(model, PROMPT, 0.0) == float("inf")


def test_full_is_what_transformers_generates(model: PreTrainedModel) -> None:
    tokens, logits = oracle.full_generate(model, PROMPT, NEW)
    ids = torch.tensor([PROMPT])
    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert tokens == theirs.sequences[0, len(PROMPT) :].tolist()
    torch.testing.assert_close(logits, torch.cat(theirs.logits), rtol=0, atol=1e-4)


def test_sparsity_zero_is_the_full_model(model: PreTrainedModel) -> None:
    everything = oracle.experts(model, PROMPT, 0.0)
    tokens, logits = oracle.masked_generate(model, PROMPT, everything, NEW)
    full_tokens, full_logits = oracle.full_generate(model, PROMPT, NEW)
    assert tokens == full_tokens
    assert logits.equal(full_logits)


def test_half_the_neurons_say_something_else(model: PreTrainedModel) -> None:
    _, logits = oracle.masked_generate(model, PROMPT, oracle.experts(model, PROMPT, 0.5), 2)
    _, full = oracle.full_generate(model, PROMPT, 2)
    assert logits[0].equal(full[0])  # of the prompt, by the full model
    assert (logits[1] - full[1]).abs().max() > 0.1


def test_masks_are_taken_off_again(model: PreTrainedModel) -> None:
    before = oracle.full_generate(model, PROMPT, 4)[1]
    oracle.masked_generate(model, PROMPT, oracle.experts(model, PROMPT, 0.9), 4)
    assert oracle.full_generate(model, PROMPT, 4)[1].equal(before)
    assert not any(down._forward_pre_hooks for down in oracle.down_projections(model))


def test_continuation_repeats_generation(model: PreTrainedModel) -> None:
    for kept in (None, oracle.experts(model, PROMPT, 0.5)):
        tokens, logits = oracle.masked_generate(model, PROMPT, kept, NEW)
        again = oracle.continuation_logits(model, PROMPT, tokens, kept)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-4)
        assert oracle.continuation_logits(model, PROMPT, tokens[:1], kept).shape == (1, VOCAB)


def test_generation_ends_after_an_end_token(model: PreTrainedModel) -> None:
    tokens, _ = oracle.full_generate(model, PROMPT, NEW)
    end = next(token for token in tokens if token != tokens[0])
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [end, VOCAB - 1]
    try:
        shorter, logits = oracle.full_generate(model, PROMPT, NEW)
    finally:
        model.generation_config.eos_token_id = before
    assert shorter == tokens[: tokens.index(end) + 1]
    assert len(logits) == len(shorter)


# Masking is pruning: the same numbers from smaller matrices.


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_rows_and_columns_cut_by_hand(tmp_path: Path, mlp_bias: bool) -> None:
    model = oracle.load(tiny_checkpoint(tmp_path, "llama", mlp_bias=mlp_bias))
    kept = oracle.experts(model, PROMPT, 0.5)
    tokens, logits = oracle.masked_generate(model, PROMPT, kept, NEW)
    small = _cut_llama(model, kept)
    assert small.model.layers[0].mlp.gate_proj.weight.shape == (48, 32)
    first, cache = oracle._forward(model, PROMPT, None)
    steps = [first]
    for token in tokens[:-1]:
        step, cache = oracle._forward(small, [token], cache)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps), logits, rtol=0, atol=1e-4)


def test_opt_cut_by_hand(tmp_path: Path) -> None:
    """The plain form, with a bias on both sides: up's is cut, down's is kept whole."""
    model = oracle.load(tiny_checkpoint(tmp_path, "opt", do_layer_norm_before=False, word_embed_proj_dim=16))
    kept = oracle.experts(model, PROMPT, 0.5)
    tokens, logits = oracle.masked_generate(model, PROMPT, kept, NEW)
    _, cache = oracle._forward(model, PROMPT, None)
    for layer, e in zip(oracle.decoder_layers(model), kept, strict=True):
        layer.fc1 = _linear(layer.fc1.weight[e], layer.fc1.bias[e])
        layer.fc2 = _linear(layer.fc2.weight[:, e], layer.fc2.bias)
    again, _ = oracle._forward(model, tokens[:-1], cache, keep=0)
    torch.testing.assert_close(again, logits[1:], rtol=0, atol=1e-4)


def _cut_llama(model: PreTrainedModel, kept: list[Tensor]) -> PreTrainedModel:
    config = AutoConfig.for_model(**{**model.config.to_dict(), "intermediate_size": len(kept[0])})
    weights = model.state_dict()
    for i, e in enumerate(kept):
        mlp = f"model.layers.{i}.mlp"
        for name in weights.keys() & {f"{mlp}.{m}_proj.{p}" for m in ("gate", "up") for p in ("weight", "bias")}:
            weights[name] = weights[name][e]
        weights[f"{mlp}.down_proj.weight"] = weights[f"{mlp}.down_proj.weight"][:, e]
    small = AutoModelForCausalLM.from_config(config).eval()
    small.load_state_dict(weights)
    return small


def _linear(weight: Tensor, bias: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    return linear


# A real model.


@pytest.mark.real
@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_real_model(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue(name)
    model = oracle.load(folder)
    prompt = AutoTokenizer.from_pretrained(folder)(text_paragraph(150)).input_ids
    kept = oracle.experts(model, prompt, 0.5)
    full, full_logits = oracle.full_generate(model, prompt, 16)
    half, half_logits = oracle.masked_generate(model, prompt, kept, 16)
    assert half_logits[0].equal(full_logits[0])
    assert half != full
    # Half the neurons, chosen by the prompt, often follow the full model's own words; half chosen by chance do not.
    torch.manual_seed(0)
    chance = [
        torch.randperm(down.in_features)[: len(e)] for down, e in zip(oracle.down_projections(model), kept, strict=True)
    ]
    assert _agreement(model, prompt, full, kept) > 0.4 > _agreement(model, prompt, full, chance)


def _agreement(model: PreTrainedModel, prompt: list[int], tokens: list[int], kept: list[Tensor]) -> float:
    """The share of tokens after the first that the masked model would choose too."""
    chosen = oracle.continuation_logits(model, prompt, tokens, kept).argmax(dim=1)
    return (chosen == torch.tensor(tokens))[1:].float().mean().item()
