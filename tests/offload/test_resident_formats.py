"""The engine with weights in 8 and 4 bits: it answers as a whole model whose weights were rounded so."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from engines import Logits, copying
from rounding import ROUNDED, rounded8
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor, nn

from griffin_offload import Engine
from griffin_offload.quant.weight import LEAST, dense_matrix, linear_module


def test_every_type_answers_as_a_model_rounded_so(every: Case) -> None:
    assert_answers_as_rounded(Engine(every.folder, dtype="float32"), every, "int4", "int8", 0.75)


# One of each layout: fused, transposed, with biases, routed, interleaved, shared experts, layers of several kinds.
LAYOUTS = ["llama", "phi3", "gpt2", "opt", "mixtral", "gpt_oss", "granitemoeshared", "nemotron_h"]


@pytest.mark.parametrize(
    ("resident_dtype", "rest", "sparsity"),
    [("int8", "drop", 0.5), ("int4", "drop", 0.5), ("bfloat16", "int4", 0.5), ("int8", "drop", 0)],
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_in_every_format(
    case: Callable[[str], Case], kind: str, resident_dtype: str, rest: str, sparsity: float
) -> None:
    engine = Engine(case(kind).folder, dtype="float32")
    assert_answers_as_rounded(engine, case(kind), resident_dtype, rest, sparsity)


def test_a_layer_packed_on_its_device_is_the_same(case: Callable[[str], Case]) -> None:
    assert_answers_as_rounded(copying(case("llama").folder), case("llama"), "int4", "int8", 0.5)


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("resident_dtype", "rest", "sparsity"),
    [
        ("int4", "drop", 1.0),
        ("int8", "int4", 1.0),
        ("bfloat16", "int8", 0),
        ("int4", "int8", 0),
        ("int8", "int4", 0.99),
    ],
)
def test_an_expert_set_for_each_prompt_is_each_prompt_alone(
    tmp_path: Path, kind: str, dtype: torch.dtype, resident_dtype: str, rest: str, sparsity: float
) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", kind, dtype=dtype))
    prompts = [tiny_prompt(20), tiny_prompt(30, 1)]
    how = {"sparsity": sparsity, "resident_dtype": resident_dtype, "rest": rest, "max_new_tokens": 4}
    alone = [engine.generate(prompt, do_sample=False, **how).token_ids for prompt in prompts]
    both = engine.generate_batch(prompts, per_prompt=True, do_sample=False, **how)
    assert [one.token_ids for one in both] == alone


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_tied_and_sharded(tmp_path: Path, tied: bool, shards: int) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "gemma3_text", tied=tied, shards=shards)
    assert_answers_as_rounded(Engine(folder), Case("gemma3_text", folder), "int8", "drop", 0.5)


def test_one_engine_goes_from_format_to_format(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", tied=True)
    engine, whole = Engine(folder, host_memory="1GiB"), Case("llama", folder)
    for resident_dtype, rest, sparsity in [
        ("int8", "drop", 0.5),
        ("bfloat16", "drop", 0.5),
        ("int4", "int4", 0.5),
        ("int4", "int4", 0.5),
        ("bfloat16", "drop", 0),
        ("int8", "drop", 0),
    ]:
        assert_answers_as_rounded(engine, whole, resident_dtype, rest, sparsity)


@pytest.mark.parametrize(("resident_dtype", "rest"), [("int8", "drop"), ("int4", "drop"), ("int4", "int8")])
def test_a_model_whose_matrices_are_joined(tmp_path: Path, resident_dtype: str, rest: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tiny_checkpoint(tmp_path / "m", "llama", **sizes, **heads)
    engine, whole = Engine(folder), Case("llama", folder)
    for sparsity in (0.5, 0):
        assert_answers_as_rounded(engine, whole, resident_dtype, rest, sparsity)
    layer: Any = engine.skeleton.modules[0]
    modules = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    modules += [layer.mlp.gate_proj, layer.mlp.up_proj]
    joined = [module.forward.quantized._joined for module in modules]
    assert len(set(joined[:3])) == len(set(joined[3:])) == 1
    assert joined[0] is not joined[3]


def assert_answers_as_rounded(engine: Engine, case: Case, resident_dtype: str, rest: str, sparsity: float) -> None:
    prompt, tokens, logits = tiny_prompt(), 6, Logits()
    model, experts = copy.deepcopy(case.model), case.kept(prompt, sparsity)
    generation = engine.generate(
        prompt,
        sparsity=sparsity,
        resident_dtype=resident_dtype,
        rest=rest,
        fold=False,
        prior="off",
        max_new_tokens=tokens,
        do_sample=False,
        logits_processor=[logits],
    )
    ids = generation.token_ids
    expected = rounded_logits(model, engine, prompt, ids, experts, resident_dtype, rest)
    ours = torch.stack(logits.steps)
    # A weight in the middle between two levels may fall to either side.
    error = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.02, error


@torch.no_grad()
def rounded_logits(
    model: Any, engine: Engine, prompt: list[int], ids: list[int], experts: Any, resident_dtype: str, rest: str
) -> Tensor:
    """Logits (N, V) of the tokens `ids` after a prompt: the prompt by the whole model, the others by one whose weights
    were rounded in place; of the head always, if it packs."""
    head: Any = model.get_output_embeddings()
    if resident_dtype != "bfloat16" and engine.skeleton.layout.quantizable_head:
        head.weight = nn.Parameter(rounded8(head.weight))  # a table that it was tied to stays as it is
    output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    found = [output.logits[0, -1]]
    experts_of = {(block.layer, block.name): kept for block, kept in zip(oracle.blocks(model), experts, strict=True)}
    blocks = [(i, layer, block) for i, layer in enumerate(engine.skeleton.layers) for block in layer.blocks]
    for layer, within in zip(engine.skeleton.layers, engine.skeleton.modules, strict=True):
        for name in layer.fixed:
            module = linear_module(within, name)
            if resident_dtype != "bfloat16" and module is not None:
                weight = dense_matrix(module, model.get_parameter(layer.prefix + name))
                if min(weight.shape) >= LEAST:
                    weight.copy_(ROUNDED[resident_dtype](weight))
    for number, layer, block in blocks:
        chosen = experts_of[number, block.path]
        first = "" if resident_dtype == "bfloat16" else resident_dtype
        for name, rows in block.rows.items():
            parameter = model.get_parameter(layer.prefix + name).data
            each = zip(parameter, chosen, strict=True) if block.routed else [(parameter, chosen)]
            for matrix, kept in each:
                if matrix.ndim < 2:
                    continue
                is_kept = torch.zeros(block.neurons, dtype=torch.bool)
                is_kept[kept] = True
                for neurons, how in ((is_kept, first), (~is_kept, rest)):
                    index = rows.index(neurons.nonzero()[:, 0])
                    if len(index) and how != "drop":
                        round_some(
                            matrix if rows.axis == (name == block.down) else matrix.T, index, how, name == block.down
                        )
    masked = experts if rest == "drop" else None
    cache = output.past_key_values
    with oracle._masked(model, masked):
        for token in ids[:-1]:
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            found.append(output.logits[0, -1])
    return torch.stack(found)


def round_some(matrix: Tensor, index: Tensor, how: str, down: bool) -> None:
    """Round some rows of a matrix (N, K), or columns (`down`), as if they were a matrix of their own."""
    if down:
        matrix[:, index] = ROUNDED[how](matrix[:, index])
    else:
        matrix[index] = ROUNDED[how](matrix[index])
