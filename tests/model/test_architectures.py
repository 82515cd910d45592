"""Every model type: streamed and pruned, against plain transformers and the oracle; and none that nobody looked at."""

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from recordable import assert_recordable
from tiny import TINY, UNSUPPORTED, tiny_checkpoint, tiny_prompt
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from griffin_offload import Engine
from griffin_offload.errors import ExportError, UnsupportedArchitecture
from griffin_offload.memory.capture import Capture
from griffin_offload.model import attention
from griffin_offload.model.architecture import ARCHITECTURES, FeedForward
from griffin_offload.model.detect import find_structure
from griffin_offload.model.modules import PIECE, Pieces
from griffin_offload.model.refused import REFUSED
from griffin_offload.model.static_step import static_decoding, why_dynamic
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.sources.catalogue import CATALOGUE
from griffin_offload.units import GIB

PROMPT, NEW = tiny_prompt(), 12
ALIASES = {"gpt-sw3"}  # whose config says gpt2
NO_SIZE = {"bloom", "gpt_neox_japanese", "mpt"}  # F follows from the hidden size


def model_type(name: str) -> str:
    return str(TINY[name].get("model_type", name))


def greedy(engine: Engine, prompt: list[int], sparsity: float) -> list[int]:
    return engine.generate(prompt, sparsity=sparsity, method="griffin", max_new_tokens=NEW, do_sample=False).token_ids


def chosen(engine: Engine) -> dict[tuple[int, str], list[Any]]:
    """The experts of the last sweep, by layer and block."""
    return {
        (index, block.path): experts.tolist()
        for index, (layer, resident) in enumerate(zip(engine.skeleton.layers, engine.kept_neurons(), strict=True))
        for block, experts in zip(layer.blocks, resident, strict=True)
    }


# transformers' own list of causal models


def test_every_causal_type_is_supported_or_refused_with_a_reason() -> None:
    known = ARCHITECTURES.keys() | REFUSED.keys() | ALIASES
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES  # test_multimodal.py
    assert not causal - known, "look at these and list them in architecture.py"
    assert not ARCHITECTURES.keys() & REFUSED.keys()
    assert not known - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert all(len(reason) > 10 for reason in REFUSED.values())


def test_every_supported_type_is_tried_here() -> None:
    untried = ARCHITECTURES.keys() - set(map(model_type, TINY)) - {"cohere_compass_text"}  # as cohere2
    assert not untried


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_refused_type_is_named_with_its_reason(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=kind) as error:
        Engine(tiny_checkpoint(tmp_path / "m", kind))
    assert REFUSED[kind] in str(error.value)


# Each type


def test_every_type(every: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    """All steps are tried, and each that fails is named; they share a model, the oracle's answers and an engine."""
    engine = Engine(every.folder, dtype="float32")
    if model_type(every.kind) not in {"gemma4_text", "nemotron_h"}:  # of several forms, which only the table knows
        with subtests.test("the structure is found"):
            assert_structure_is_found(engine)
    with subtests.test("streamed is resident, and pruned is masked"):
        assert_equals_oracle(engine, every)
    with subtests.test("a batch answers as each alone"):
        assert_batch_answers_as_each_alone(engine, every)
    with subtests.test("an export is the resident model"):
        assert_export_is_resident(engine, every, tmp_path / "out")
    with subtests.test("in shards, and tied the other way"):
        assert_pruned_is_masked(other_ties(every.kind, tmp_path / "ties"))
    if biases := other_biases(every.kind):
        with subtests.test("with the biases the other way"):
            assert_pruned_is_masked(tiny_checkpoint(tmp_path / "biases", every.kind, **biases))
    with subtests.test("static steps give the model's tokens, and a GPU can record them"):
        assert_static_steps(every)
    if not ARCHITECTURES[model_type(every.kind)].own_mask:
        with subtests.test("attention in pieces is attention"):
            assert_attention_in_pieces(engine, every.folder, monkeypatch)


def assert_static_steps(case: Case) -> None:
    """Tokens decoded by them are the oracle's, and nothing in them is left to the host; or a reason is given."""
    engine = Engine(case.folder, dtype="float32")
    if why_dynamic(engine.skeleton):
        return
    expected, _ = case.answer(PROMPT, 0.5, NEW)
    with static_decoding(engine.skeleton, Capture("cpu")) as step:
        assert greedy(engine, PROMPT, 0.5) == expected
    if not step.steps.why_dynamic:
        assert_recordable(engine, step)


def assert_structure_is_found(engine: Engine) -> None:
    """What is found by shape is what the table says, in each layer; names of blocks that no layer has aside."""
    found = find_structure(engine.skeleton.model)
    assert found.layers == engine.skeleton.entry.layers
    in_use = {block.path for layer in engine.skeleton.layers for block in layer.blocks}
    assert {getattr(block, "down", None) or block.path for block in found.blocks} == in_use  # type: ignore[union-attr]
    for block in found.blocks:
        if isinstance(block, FeedForward):
            table = next(b for b in engine.skeleton.entry.blocks if isinstance(b, FeedForward) and b.down == block.down)
            assert (set(block.up), block.halves) == (set(table.up), table.halves)


def assert_equals_oracle(engine: Engine, case: Case) -> None:
    """Logits, cache, tokens and kept neurons; and the cache is no larger than planned."""
    model, ids = case.model, torch.tensor([PROMPT])
    with torch.no_grad():
        whole = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    streamed = engine.sweep(PROMPT, sparsity=0.5, method="griffin")
    torch.testing.assert_close(streamed.logits[0, -1], whole.logits[0, -1], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(streamed.past_key_values.layers, whole.past_key_values.layers, strict=True):
        for name in {"keys", "values", "conv_states", "recurrent_states"} & vars(theirs).keys():
            assert_states_equal(getattr(ours, name), getattr(theirs, name))
    held = sum(t.nbytes for layer in whole.past_key_values.layers for t in states(layer))
    assert held <= engine.sizes.cache(len(PROMPT))
    assert greedy(engine, PROMPT, 0.0) == case.answer(PROMPT, 0.0, NEW)[0]
    for sparsity in (0.5, 0.9):
        assert greedy(engine, PROMPT, sparsity) == case.answer(PROMPT, sparsity, NEW)[0]
        pairs = zip(oracle.blocks(model), case.kept(PROMPT, sparsity), strict=True)
        assert chosen(engine) == {(block.layer, block.name): kept.tolist() for block, kept in pairs}


def states(layer: Any) -> list[torch.Tensor]:
    return [t for name in ("keys", "values") if isinstance(t := getattr(layer, name, None), torch.Tensor)]


def assert_states_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert type(ours) is type(theirs)


def assert_batch_answers_as_each_alone(engine: Engine, case: Case) -> None:
    """The whole model for prompts of different lengths, and kept neurons of its own for each; one token too."""
    prompts = [tiny_prompt(30), tiny_prompt(22, 1), tiny_prompt(1)]
    together = engine.generate_batch(prompts, sparsity=0.0, max_new_tokens=NEW, do_sample=False)
    assert [answer.token_ids for answer in together] == [case.answer(ids, 0.0, NEW)[0] for ids in prompts]
    each = engine.generate_batch(
        prompts, per_prompt=True, sparsity=0.5, method="griffin", max_new_tokens=NEW, do_sample=False
    )
    assert [answer.token_ids for answer in each] == [case.answer(ids, 0.5, NEW)[0] for ids in prompts]


def assert_export_is_resident(engine: Engine, case: Case, out: Path) -> None:
    """The weights bit for bit, and the same answer after the same prompt."""
    if model_type(case.kind) in NO_SIZE:
        with pytest.raises(ExportError, match="no field for fewer neurons"):
            engine.export(PROMPT, out, prompt_text="x", fold=False, prior="off")
        return
    output = engine.sweep(PROMPT, sparsity=0.5, method="griffin")
    first, cache = int(output.logits[0, -1].argmax()), copy.deepcopy(output.past_key_values)
    weights = {name: tensor.clone() for name, tensor in engine.skeleton.model.state_dict().items()}
    if table := engine.skeleton.layout.table:  # it stays in its file
        weights[table] = case.model.state_dict()[table]
    Engine(case.folder).export(PROMPT, out, prompt_text="x", fold=False, prior="off")
    model, facts = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(facts.values()), facts
    for name, tensor in model.state_dict().items():
        ours = weights[name]
        assert tensor.dtype == ours.dtype
        assert torch.equal(tensor[tuple(map(slice, ours.shape))], ours), name
    tokens = [first]
    with torch.no_grad():
        while len(tokens) < NEW and tokens[-1] not in oracle.end_tokens(model):
            step = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
    assert tokens == case.answer(PROMPT, 0.5, NEW)[0]


BIASES = (
    "mlp_bias",
    "attention_bias",
    "use_bias",
    "bias",
    "enable_bias",
    "use_qkv_bias",
    "qkv_bias",
    "add_bias_linear",
)
ONE_SHARD = {"gpt_bigcode", "gpt_neo", "hy_v4"}  # one tensor is more than half of a tiny one


def assert_pruned_is_masked(folder: Path) -> None:
    model, engine = oracle.load(folder), Engine(folder)
    experts = oracle.experts(model, PROMPT, 0.5)
    assert greedy(engine, PROMPT, 0.5) == oracle.masked_generate(model, PROMPT, experts, NEW)[0]


def other_ties(kind: str, folder: Path) -> Path:
    """The published form of the ties is each type's own case; here the other one, in more than one file."""
    tied = not TINY[kind].get("tie_word_embeddings", True)
    return tiny_checkpoint(folder, kind, tied=tied, shards=1 if kind in ONE_SHARD else 2)


def other_biases(kind: str) -> dict[str, bool]:
    """Every option for biases the other way; none where the type has none."""
    config = CONFIG_MAPPING[model_type(kind)](**{k: v for k, v in TINY[kind].items() if k != "model_type"})
    return {name: not value for name in BIASES if isinstance(value := getattr(config, name, None), bool)}


def assert_attention_in_pieces(whole: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt, whole and padded in a batch; where layers slide, no mask of the whole prompt is written."""
    prompts = [tiny_prompt(40), tiny_prompt(29, 1)]
    options = {"sparsity": 0.5, "max_new_tokens": 4, "do_sample": False}
    expected = [answer.token_ids for answer in whole.generate_batch(prompts, **options)]
    asked: list[int] = []
    rows = attention.Mask.rows
    monkeypatch.setattr(attention.Mask, "rows", lambda self, a, b: (asked.append(b - a), rows(self, a, b))[1])
    monkeypatch.setattr("griffin_offload.model.modules.PIECE", 7)
    engine = Engine(folder, dtype="float32")
    assert [answer.token_ids for answer in engine.generate_batch(prompts, **options)] == expected
    if attention.in_pieces(engine.skeleton.model):
        assert max(asked) == 7
        asked.clear()
        slides = any(window and window < 40 for window in engine.sizes.windows)
        engine.generate(prompts[0], **options, no_fidelity=True)
        assert bool(asked) == (slides or bool(engine.sizes.score_heads))


# Long prompts


@pytest.mark.parametrize("alias", ["llama-3-8b", "mistral-7b-v0.3", "qwen2.5-7b"])
def test_a_prompt_of_32k_tokens_holds_less_than_2_gib_of_activations(alias: str) -> None:
    sizes = catalogue_sizes(CATALOGUE[alias].config)
    assert sizes.activations(32 * 1024) < 2 * GIB


def test_no_mask_is_written_out_where_none_is_needed(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    masks: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
        for layer in engine.skeleton.modules
    ]
    engine.generate(PROMPT, sparsity=0.5, max_new_tokens=NEW, do_sample=False, no_fidelity=True)
    assert len(masks) >= 3
    assert all(mask is None for mask in masks)
    masks.clear()
    engine.generate_batch([PROMPT, tiny_prompt(20)], sparsity=0.5, method="griffin", max_new_tokens=2, do_sample=False)
    assert masks[0].shape == (2, 1, 48, 48)  # padding needs one
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama", "bloom", "mixtral", "granitemoe", "gpt2", "phi3"])
def test_a_block_in_pieces_is_the_block(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token for itself, so that a prompt longer than PIECE gives the same tokens and the same experts."""
    folder = tiny_checkpoint(tmp_path / "m", kind)
    engine = Engine(folder, dtype="float32")
    whole, experts = greedy(engine, PROMPT, 0.5), chosen(engine)
    prompts = [tiny_prompt(30), tiny_prompt(45, 1)]
    pooled = engine.generate_batch(prompts, sparsity=0.5, method="griffin", max_new_tokens=NEW, do_sample=False)
    pooled_experts = chosen(engine)
    assert len(PROMPT) < PIECE
    monkeypatch.setattr("griffin_offload.model.modules.PIECE", 7)
    assert greedy(engine, PROMPT, 0.5) == whole
    assert chosen(engine) == experts
    again = engine.generate_batch(prompts, sparsity=0.5, method="griffin", max_new_tokens=NEW, do_sample=False)
    assert [a.token_ids for a in again] == [a.token_ids for a in pooled]
    assert chosen(engine) == pooled_experts


def test_pieces_are_as_long_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("griffin_offload.model.modules.PIECE", 4)
    seen: list[tuple[int, int]] = []
    pieces = Pieces(lambda x: (seen.append((pieces.begin, x.shape[1])), 2 * x)[1])
    x = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert torch.equal(pieces(x), 2 * x)
    assert seen == [(0, 4), (4, 4), (8, 2)]
