"""The oracle is right: against the paper's identities, transformers' own generate, and weights pruned by hand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass
class Run:
    """A tiny model, and what the oracle says of it for the prompt."""

    model: PreTrainedModel
    z: list[oracle.Activations]
    s: list[Tensor]
    kept: list[torch.LongTensor]  # at sparsity 0.5
    full: tuple[list[int], Tensor]  # tokens and logits
    half: tuple[list[int], Tensor]


@pytest.fixture(scope="module")
def run(tiny: Path) -> Run:
    model = oracle.load(tiny)
    kept = oracle.experts(model, PROMPT, 0.5)
    return Run(
        model=model,
        z=oracle.activations(model, PROMPT),
        s=oracle.statistic(model, PROMPT),
        kept=kept,
        full=oracle.full_generate(model, PROMPT, NEW),
        half=oracle.masked_generate(model, PROMPT, kept, NEW),
    )


# The tiny models are fit to test with.


def test_tiny_models_speak(run: Run) -> None:
    for tokens, logits in (run.full, run.half):
        best, second = logits.topk(2).values.unbind(1)
        assert len(tokens) == NEW  # none ended early
        assert len(set(tokens)) >= 4
        assert min(tokens) >= len(SPECIALS)
        assert (best - second).min() > 3e-4  # no near ties, which rounding could turn
    assert min(oracle.margin(run.model, PROMPT, sparsity) for sparsity in (0.5, 0.9)) > 1e-5


def test_tiny_models_have_no_default_parameter(run: Run) -> None:
    for name, parameter in run.model.named_parameters():
        assert parameter.numel() < 5 or parameter.std() > 0.05, name


def test_every_routed_expert_gets_tokens(run: Run) -> None:
    for z in run.z:
        assert isinstance(z, Tensor) or all(rows.any() for rows in z)


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


def test_every_layer_has_blocks(run: Run) -> None:
    blocks = oracle.blocks(run.model)
    assert sorted({block.layer for block in blocks}) == list(range(run.model.config.num_hidden_layers))
    assert oracle.down_projections(run.model) == [block.module for block in blocks]
    for block, s in zip(blocks, run.s, strict=True):
        assert s.ndim == (2 if block.routed else 1)
        assert 32 <= s.shape[-1] <= 128  # as tiny_types.py says


def test_z_is_the_input_of_down(run: Run) -> None:
    for z in run.z:
        rows = torch.cat(z) if isinstance(z, list) else z
        assert len(rows) % len(PROMPT) == 0
        assert (rows.abs().amax(dim=0) > 0).float().mean() > 0.8  # most neurons take part


@pytest.mark.parametrize("tokens", [1, 48])
def test_squares_sum_to_the_number_of_tokens(run: Run, tokens: int) -> None:
    for s in run.s if tokens == len(PROMPT) else oracle.statistic(run.model, tiny_prompt(tokens)):
        choices = 1 if s.ndim == 1 else _choices(run.model)
        assert s.square().sum().item() == pytest.approx(tokens * choices, rel=1e-5)


def _choices(model: PreTrainedModel) -> int:
    """The number of experts that a token is routed to."""
    config = model.config
    return next(n for name in ("num_experts_per_tok", "top_k_experts") if (n := getattr(config, name, None)))


def test_statistic_by_the_formula_in_float64(run: Run) -> None:
    for block_z, block_s in zip(run.z, run.s, strict=True):
        pairs = zip(block_z, block_s, strict=True) if isinstance(block_z, list) else [(block_z, block_s)]
        for z, s in pairs:
            total = [0.0] * len(s)
            for row in z.double().tolist():
                square = sum(x * x for x in row) or 1.0
                total = [t + x * x / square for t, x in zip(total, row, strict=True)]
            torch.testing.assert_close(s.double(), torch.tensor(total).double().sqrt(), rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_counts_for_nothing() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert oracle._column_norms(z).tolist() == pytest.approx([0.6, 0.8])
    assert oracle._column_norms(z[:0]).tolist() == [0, 0]  # an expert that no token is routed to


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_experts_are_the_largest(run: Run, sparsity: float) -> None:
    for block in run.s:
        for s, kept in zip(block.reshape(-1, block.shape[-1]), _rows(oracle._largest(block, sparsity)), strict=True):
            assert len(kept) == int(len(s) * (1 - sparsity))
            assert kept.tolist() == sorted(set(kept.tolist()))
            rest = torch.ones(len(s), dtype=torch.bool)
            rest[kept] = False
            assert sparsity == 0 or s[kept].min() > s[rest].max()


def _rows(kept: Tensor) -> Tensor:
    return kept if kept.ndim > 1 else kept[None]


def test_of_equals_the_first_are_kept() -> None:
    s = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 3.0])
    assert oracle._largest(s, 0.5).tolist() == [0, 1, 5]
    assert oracle._largest(s, 0.9).tolist() == []
    assert oracle._largest(torch.stack([s, torch.zeros(6)]), 0.5).tolist() == [[0, 1, 5], [0, 1, 2]]


def test_margin_is_the_tightest_gap(run: Run) -> None:
    gaps = []
    for block in run.s:
        for s, kept in zip(block.reshape(-1, block.shape[-1]), _rows(oracle._largest(block, 0.5)), strict=True):
            rest = [x for i, x in enumerate(s.tolist()) if i not in set(kept.tolist())]
            gaps.append(1 - max(rest) / s[kept].min().item())
    assert oracle.margin(run.model, PROMPT, 0.5) == pytest.approx(min(gaps), rel=0.05, abs=1e-6)
    assert oracle.margin(run.model, PROMPT, 0.0) == float("inf")


def test_full_is_what_transformers_generates(run: Run) -> None:
    tokens, logits = run.full
    ids = torch.tensor([PROMPT])
    theirs = run.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert tokens[:8] == theirs.sequences[0, len(PROMPT) :].tolist()
    torch.testing.assert_close(logits[:8], torch.cat(theirs.logits), rtol=0, atol=1e-4)


def test_full_is_a_forward_without_a_cache(run: Run) -> None:
    tokens, logits = run.full
    with torch.no_grad():
        without = run.model(torch.tensor([PROMPT + tokens[:-1]]), use_cache=False, logits_to_keep=NEW).logits[0]
    torch.testing.assert_close(logits, without, rtol=0, atol=1e-4)


def test_sparsity_zero_is_the_full_model(run: Run) -> None:
    everything = [oracle._largest(s, 0.0) for s in run.s]
    tokens, logits = oracle.masked_generate(run.model, PROMPT, everything, 4)
    assert tokens == run.full[0][:4]
    torch.testing.assert_close(logits, run.full[1][:4], rtol=0, atol=1e-5)  # a mixture's experts go by hand: rounding


def test_half_the_neurons_say_something_else(run: Run) -> None:
    assert run.half[1][0].equal(run.full[1][0])  # of the prompt, by the full model
    assert (run.half[1][1] - run.full[1][1]).abs().max() > 0.05


def test_masks_are_taken_off_again(run: Run) -> None:
    with oracle._masked(run.model, [kept[..., :1] for kept in run.kept]):
        assert not oracle.full_generate(run.model, PROMPT, 1)[1].allclose(run.full[1][:1])
    assert oracle.full_generate(run.model, PROMPT, 1)[1].equal(run.full[1][:1])
    for module in oracle.down_projections(run.model):
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_continuation_repeats_generation(run: Run) -> None:
    for kept, (tokens, logits) in ((None, run.full), (run.kept, run.half)):
        again = oracle.continuation_logits(run.model, PROMPT, tokens, kept)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-4)
    assert oracle.continuation_logits(run.model, PROMPT, run.full[0][:1], None).shape == (1, VOCAB)


def test_generation_ends_after_an_end_token(tmp_path: Path) -> None:
    model = oracle.load(tiny_checkpoint(tmp_path, "llama"))
    tokens, _ = oracle.full_generate(model, PROMPT, NEW)
    end = next(token for token in tokens if token != tokens[0])
    model.generation_config.eos_token_id = [end, VOCAB - 1]
    shorter, logits = oracle.full_generate(model, PROMPT, NEW)
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


@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral", "gpt_oss"])
def test_other_layouts_cut_by_hand(tmp_path: Path, name: str) -> None:
    """Gate and up in one matrix, matrices that are (in, out), and routed experts, with gate and up in turns."""
    model = oracle.load(tiny_checkpoint(tmp_path, name))
    kept = oracle.experts(model, PROMPT, 0.5)
    tokens, logits = oracle.masked_generate(model, PROMPT, kept, NEW)
    _, cache = oracle._forward(model, PROMPT, None)
    for layer, e in zip(oracle.decoder_layers(model), kept, strict=True):
        _CUT[name](layer.mlp, e)
    again, _ = oracle._forward(model, tokens[:-1], cache, keep=0)
    torch.testing.assert_close(again, logits[1:], rtol=0, atol=1e-4)


def _cut_phi3(mlp: Any, e: Tensor) -> None:
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    _set(mlp.gate_up_proj, "weight", torch.cat([gate[e], up[e]]))
    _set(mlp.down_proj, "weight", mlp.down_proj.weight[:, e])


def _cut_gpt2(mlp: Any, e: Tensor) -> None:
    _set(mlp.c_fc, "weight", mlp.c_fc.weight[:, e])
    _set(mlp.c_fc, "bias", mlp.c_fc.bias[e])
    _set(mlp.c_proj, "weight", mlp.c_proj.weight[e])
    mlp.c_fc.nf = len(e)


def _cut_mixtral(mlp: Any, e: Tensor) -> None:
    experts = mlp.experts
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    pairs = [torch.cat([g[kept], u[kept]]) for g, u, kept in zip(gate, up, e, strict=True)]
    _set(experts, "gate_up_proj", torch.stack(pairs))
    _set(experts, "down_proj", torch.stack([d[:, kept] for d, kept in zip(experts.down_proj, e, strict=True)]))


def _cut_gpt_oss(mlp: Any, e: Tensor) -> None:
    experts, both = mlp.experts, [torch.stack([2 * kept, 2 * kept + 1], dim=1).flatten() for kept in e]
    up, bias, down = experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj
    _set(experts, "gate_up_proj", torch.stack([w[:, i] for w, i in zip(up, both, strict=True)]))
    _set(experts, "gate_up_proj_bias", torch.stack([b[i] for b, i in zip(bias, both, strict=True)]))
    _set(experts, "down_proj", torch.stack([w[i] for w, i in zip(down, e, strict=True)]))


_CUT = {"phi3": _cut_phi3, "gpt2": _cut_gpt2, "mixtral": _cut_mixtral, "gpt_oss": _cut_gpt_oss}


def _set(module: Any, name: str, value: Tensor) -> None:
    setattr(module, name, torch.nn.Parameter(value.detach()))


def test_opt_cut_by_hand(tmp_path: Path) -> None:
    """The plain form, with a bias on both sides: up's is cut, down's is kept whole."""
    model = oracle.load(tiny_checkpoint(tmp_path, "opt-post"))
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
