"""Weights in 8 and 4 bits: each format against a slow reference, and the engine against a whole model whose weights
were rounded so, for every architecture."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from engines import Logits, copying
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor, nn

from griffin_offload import Engine
from griffin_offload.memory.arena import Arena
from griffin_offload.model.layout import NeuronRows
from griffin_offload.offload.gather import rows_of
from griffin_offload.options import RESIDENT_DTYPES, RESTS
from griffin_offload.quant.formats import FORMATS, allocate_weight
from griffin_offload.quant.joined import Part, Split, take_joined
from griffin_offload.quant.precision import precision
from griffin_offload.quant.weight import CHUNK, GROUP, LEAST, Scratch, dense_matrix, linear_module


def test_the_options_name_every_format() -> None:
    named = set(FORMATS) - {""}
    assert set(RESIDENT_DTYPES) == {"bfloat16", *named}
    assert set(RESTS) == {"drop", *named}
    assert all(precision(name, "drop").kept == (name if name in named else "") for name in RESIDENT_DTYPES)


ERROR = {"": 0.004, "int8": 0.013, "int4": 0.1}  # of a product with normal weights, in bfloat16


def rounded8(matrix: Tensor) -> Tensor:
    """(N, K), float32: each row to 255 levels about 0."""
    scale = matrix.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (matrix / scale).round() * scale


def rounded4(matrix: Tensor) -> Tensor:
    """(N, K), float32: each GROUP of a row to 16 levels from its least to its largest; a last group has zeros too."""
    rows, columns = matrix.shape
    groups = nn.functional.pad(matrix, (0, -columns % GROUP)).view(rows, -1, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((most - least) / 15).clamp_min(1e-10)
    return (((groups - least) / step).round() * step + least).reshape(rows, -1)[:, :columns]


ROUNDED: dict[str, Any] = {"": lambda matrix: matrix.clone(), "int8": rounded8, "int4": rounded4}


def take(name: str, matrix: Tensor) -> Any:
    """A matrix in a format."""
    rows, columns = matrix.shape
    arena = Arena(FORMATS[name].bytes(rows, columns, matrix.dtype.itemsize))
    weight = allocate_weight(name, arena, rows, columns, matrix.dtype)
    assert arena.used <= arena.size
    weight.fill(lambda begin, end, _: matrix[begin:end], Scratch(columns, matrix.dtype.itemsize, "cpu"))
    return weight


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 16), (48, 96), (64, 33), (100, 50), (7, 40), (300, 128), (640, 1100)])
def test_a_product_in_float32_is_that_of_the_rounded_matrix(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(shape), torch.randn(3, 2, shape[1])
    before = matrix.clone()
    out = take(name, matrix).linear(x)
    assert torch.equal(matrix, before)
    assert out.shape == (3, 2, shape[0])
    exact = x @ ROUNDED[name](matrix).T
    assert (out - exact).norm() < 2e-3 * exact.norm()  # a weight in the middle between two levels may fall to either


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (100, 50), (320, 200), (7, 40), (576, 1536)])
def test_a_product_in_bfloat16_is_right_but_for_its_rounding(name: str, tokens: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(shape).bfloat16(), torch.randn(tokens, shape[1]).bfloat16()
    weight, exact = take(name, matrix), x.float() @ matrix.float().T
    out = weight.linear(x)
    assert out.dtype == torch.bfloat16
    error = (out.float() - exact).norm() / exact.norm()
    assert error < ERROR[name] * (1.5 if tokens * shape[0] < 500 else 1.0)
    if tokens > 1:  # rows of a larger tensor, which lie anywhere
        apart = torch.zeros(tokens, shape[1] + 1, dtype=torch.bfloat16)
        apart[:, 1:] = x
        torch.testing.assert_close(weight.linear(apart[:, 1:]), out, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_large_activations_stay_within_float16(name: str) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(64, 1536).mul(0.02).half(), torch.randn(2, 1536).mul(300).half()
    exact = x.float() @ matrix.float().T
    out = take(name, matrix).linear(x).float()
    assert (out - exact).norm() < ERROR[name] * exact.norm()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rows_of_zeros_and_of_one_value_stay_so(name: str) -> None:
    matrix = torch.stack([torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), -2.5), torch.arange(64.0)])
    out = take(name, matrix).linear(torch.eye(64)).T
    torch.testing.assert_close(out[:3], matrix[:3], rtol=1e-2, atol=1e-6)
    assert (out[3] - matrix[3]).abs().max() <= (0.3 if name == "int8" else 2.2)


@pytest.mark.parametrize("halves", [False, True])
def test_a_split_is_the_whole(halves: bool) -> None:
    torch.manual_seed(0)
    up, down, x = torch.randn(40, 32), torch.randn(32, 40), torch.randn(5, 32)
    order = [*range(0, 12), *range(20, 32), *range(12, 20), *range(32, 40)] if halves else list(range(40))
    split = Split([take("", up[order][:24]), take("", up[order][24:])], [24, 16], down=False, halves=halves)
    torch.testing.assert_close(split.linear(x), x @ up.T)
    split = Split([take("", down[:, :24]), take("", down[:, 24:])], [24, 16], down=True)
    torch.testing.assert_close(split.linear(x @ up.T), x @ up.T @ down.T)


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
    joined = [module.forward.packed._joined for module in modules]
    assert len(set(joined[:3])) == len(set(joined[3:])) == 1
    assert joined[0] is not joined[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_joined_matrices_are_each_by_itself(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("griffin_offload.quant.onednn.LARGEST", 2 * CHUNK * 96)
    rows, matrices = [128, 704, 64], [torch.randn(count, 96).to(dtype) for count in (128, 704, 64)]
    arena = Arena(sum(FORMATS[name].bytes(count, 96, dtype.itemsize) for count in rows))
    parts = take_joined(name, arena, rows, 96, dtype)
    for number in (2, 0, 1):
        matrix = matrices[number]
        parts[number].fill(lambda begin, end, _, m=matrix: m[begin:end], Scratch(96, dtype.itemsize, "cpu"))
    alone = [take(name, matrix) for matrix in matrices]
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 96).to(dtype)
        for part, one in zip(parts, alone, strict=True):
            torch.testing.assert_close(part.linear(x), one.linear(x), rtol=0.01, atol=0.1)
    read = [sum(t.numel() * t.element_size() for t in part.tensors) for part in parts]
    assert read[0] > 0
    assert read[1:] == [0, 0]


def test_joined_matrices_are_multiplied_once_for_each_input() -> None:
    torch.manual_seed(0)
    parts: Any = take_joined("int8", Arena(2**16), [64, 64], 64, torch.float32)
    for part in parts:
        assert isinstance(part, Part)
        matrix = torch.randn(64, 64)
        part.fill(lambda begin, end, _, m=matrix: m[begin:end], Scratch(64, 4, "cpu"))
    whole = parts[0]._joined.weight
    calls: list[int] = []
    linear = whole.linear
    whole.linear = lambda x: calls.append(1) or linear(x)
    x = torch.randn(1, 64)
    first = [part.linear(x) for part in parts]
    assert len(calls) == 1
    assert parts[0]._joined._outs.get(x) is None  # nothing is kept when all have theirs
    torch.testing.assert_close(torch.cat(first, 1), linear(x))
    parts[0].linear(x)
    x.neg_()
    torch.testing.assert_close(parts[1].linear(x), -first[1])
    other = x.clone()
    torch.testing.assert_close(parts[0].linear(other), -first[0])
    assert len(calls) == 4
    with torch.inference_mode():
        other = x.clone()
        parts[0].linear(other)
        other.neg_()
        torch.testing.assert_close(parts[1].linear(other), first[1])


def test_rows_that_are_no_whole_blocks_are_not_joined() -> None:
    assert not any(isinstance(part, Part) for part in take_joined("int4", Arena(2**16), [64, 40], 64, torch.bfloat16))


def assert_answers_as_rounded(engine: Engine, case: Case, resident_dtype: str, rest: str, sparsity: float) -> None:
    prompt, tokens, logits = tiny_prompt(), 6, Logits()
    model, experts = copy.deepcopy(case.model), case.kept(prompt, sparsity)
    generation = engine.generate(
        prompt,
        sparsity=sparsity,
        resident_dtype=resident_dtype,
        rest=rest,
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
    for layer in engine.skeleton.layers:
        for name in layer.fixed:
            module = linear_module(layer.module, name)
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


@pytest.mark.parametrize("name", FORMATS)
def test_packing_takes_no_memory_but_its_scratch(name: str) -> None:
    """Large blocks that come and go would leave holes in the heap, so that no plan knew the peak."""
    matrix, scratch = torch.randn(512, 2048).bfloat16(), Scratch(2048, 2, "cpu")
    weight = allocate_weight(name, Arena(FORMATS[name].bytes(512, 2048, 2)), 512, 2048, torch.bfloat16)
    index = torch.arange(512).flip(0)
    rows = rows_of(matrix, NeuronRows(0, 512), index, down=False)
    weight.fill(rows, scratch)  # the first takes the scratch, and oneDNN's memory
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        weight.fill(rows, scratch)
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(taken) <= CHUNK * 2048 // GROUP * 4  # a number of float32 for each group
    exact = matrix[index].float()
    assert (weight.linear(torch.eye(2048).bfloat16()).T.float() - exact).norm() < ERROR[name] * exact.norm()
