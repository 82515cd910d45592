"""Products of a few tokens in Triton: on a GPU if there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import ROUNDED, assert_product, dequantized
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.memory.arena import Arena
from griffin_offload.quant import formats, int4, int8, kernels, onednn
from griffin_offload.quant.joined import Part, Split, take_joined
from griffin_offload.quant.weight import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Older interpreters fail with numpy 2.4; the kernels run with Triton 3.6 too.
OLDEST = "3.6" if DEVICE == "cuda" else "3.7"
pytest.importorskip("triton", OLDEST, reason="Triton is not installed (it comes with torch for CUDA), or is too old")

from griffin_offload.quant import triton_kernels  # noqa: E402

FEW = 3  # a program takes 25 ms in the interpreter
NAMES, DTYPES = ["int8", "int4"], [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the CPU are multiplied as those of a GPU are."""
    monkeypatch.setattr(triton_kernels, "FEW", FEW)
    monkeypatch.setattr(triton_kernels, "_rows_of_a_program", lambda rows: 8)
    for module in (int8, int4):
        monkeypatch.setattr(module, "triton_on", lambda _: triton_kernels)
    monkeypatch.setattr(onednn, "is_fast", lambda: False)


def filled(name: str, matrix: Tensor) -> Any:
    """A matrix in a format."""
    rows, columns = matrix.shape
    arena = Arena(formats.FORMATS[name].bytes(rows, columns, matrix.dtype.itemsize), DEVICE)
    weight = formats.allocate_weight(name, arena, rows, columns, matrix.dtype)
    assert weight.kernel == "triton"
    assert weight.tensors[0].is_contiguous()  # `memory_bandwidth` reads it as rows of bytes
    weight.fill(lambda begin, end, _: matrix[begin:end], Scratch(columns, matrix.dtype.itemsize, DEVICE))
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "tokens"), [((16, 64), 1), ((9, 41), FEW)])
def test_a_product_is_the_dequantized_matrixs(
    name: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(tokens, shape[1], device=DEVICE).to(dtype)
    x[-1, 5:] = 0
    weight = filled(name, matrix)
    rounded = dequantized(weight, *shape)
    expected = ROUNDED[name](matrix.float()).cpu()
    assert (rounded - expected).norm() <= (3e-3 if dtype == torch.float32 else 3e-2) * expected.norm()
    out = weight.linear(x)
    assert out.dtype == dtype
    assert_product(out, x, rounded)
    assert torch.equal(weight.linear(x.view(tokens, 1, -1)), out.view(tokens, 1, -1))
    apart = torch.empty(tokens, shape[1] + 3, dtype=dtype, device=DEVICE)
    apart[:, 3:] = x
    assert torch.equal(weight.linear(apart[:, 3:]), out)
    assert torch.equal(weight.linear(x.t().contiguous().t()), out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_number_of_rows_in_a_program(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    monkeypatch.setattr(triton_kernels, "_rows_of_a_program", lambda rows: count)
    torch.manual_seed(0)
    columns = 5000 // count  # two steps
    matrix, x = torch.randn(5, columns, device=DEVICE), torch.randn(1, columns, device=DEVICE)
    weight = filled(name, matrix)
    assert_product(weight.linear(x), x, dequantized(weight, 5, columns))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_are_multiplied_by_dense_rows(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(40, 72, device=DEVICE).to(dtype), torch.randn(FEW + 1, 72, device=DEVICE).to(dtype)
    weight, launches = filled(name, matrix), []
    monkeypatch.setattr(triton_kernels, f"multiply_{name}", lambda *args: launches.append(1))
    out = weight.linear(x).cpu().double()
    assert not launches
    exact = x.cpu().double() @ dequantized(weight, 40, 72).T
    assert (out - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_sums_larger_than_float16_are_those_of_float32(name: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 256, device=DEVICE).mul(2000).half()
    x = torch.full((1, 256), 60.0, device=DEVICE).half()
    x[:, 1::2] *= -1
    matrix[:, 1::2] = matrix[:, ::2]  # the sum is near zero, its first half is not
    weight = filled(name, matrix)
    out = weight.linear(x)
    assert out.isfinite().all()
    assert_product(out, x, dequantized(weight, 16, 256))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_so(name: str) -> None:
    weight = filled(name, torch.randn(16, 64, device=DEVICE))
    for value in (torch.nan, torch.inf):
        x = torch.ones(1, 64, device=DEVICE)
        x[0, 5] = value
        assert not weight.linear(x).isfinite().any()


@pytest.mark.parametrize("name", NAMES)
def test_joined_matrices_take_one_launch_and_are_each_by_itself(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    torch.manual_seed(0)
    rows, matrices = [64, 128], [torch.randn(count, 96, device=DEVICE) for count in (64, 128)]
    arena = Arena(sum(formats.FORMATS[name].bytes(count, 96, 4) for count in rows), DEVICE)
    parts = take_joined(name, arena, rows, 96, torch.float32)
    for part, matrix in reversed(list(zip(parts, matrices, strict=True))):
        assert isinstance(part, Part)
        assert part.kernel == "triton"
        part.fill(lambda begin, end, _, m=matrix: m[begin:end], Scratch(96, 4, DEVICE))
    monkeypatch.setattr(triton_kernels, "_rows_of_a_program", lambda rows: 64)
    launches, product = [], getattr(triton_kernels, f"multiply_{name}")
    monkeypatch.setattr(triton_kernels, f"multiply_{name}", lambda *args: launches.append(1) or product(*args))
    x = torch.randn(1, 96, device=DEVICE)
    outs = [part.linear(x) for part in parts]
    assert len(launches) == 1
    for out, matrix in zip(outs, matrices, strict=True):
        assert torch.equal(out, filled(name, matrix).linear(x))


def test_both_parts_of_a_split_are_multiplied_by_triton() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(40, 32, device=DEVICE), torch.randn(32, 40, device=DEVICE)
    x = torch.randn(2, 32, device=DEVICE)
    parts = [filled("int8", up[:24]), filled("int4", up[24:])]
    whole = torch.cat([dequantized(part, rows, 32) for part, rows in zip(parts, (24, 16), strict=True)])
    z = Split(parts, [24, 16], down=False).linear(x)
    assert_product(z, x, whole)
    parts = [filled("int8", down[:, :24]), filled("int4", down[:, 24:])]
    whole = torch.cat([dequantized(part, 32, columns) for part, columns in zip(parts, (24, 16), strict=True)], 1)
    assert_product(Split(parts, [24, 16], down=True).linear(z), z, whole)


def test_an_answer_is_that_of_dense_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_kernels, "_rows_of_a_program", lambda rows: 64)
    engine, launches = Engine(tiny_checkpoint(tmp_path, "llama"), device=DEVICE, dtype="float32"), []
    asked = {"sparsity": 0.5, "resident_dtype": "int8", "rest": "int4", "max_new_tokens": 3, "do_sample": False}
    for name in NAMES:
        product = getattr(triton_kernels, f"multiply_{name}")
        counted = lambda *args, name=name, product=product: launches.append(name) or product(*args)  # noqa: E731
        monkeypatch.setattr(triton_kernels, f"multiply_{name}", counted)
    by_triton = engine.generate(tiny_prompt(), **asked).token_ids
    assert set(launches) == set(NAMES)
    monkeypatch.setattr(triton_kernels, "FEW", 0)
    launches.clear()
    assert engine.generate(tiny_prompt(), **asked).token_ids == by_triton
    assert not launches


def test_triton_is_not_used_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels.check(torch.device(DEVICE))
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(triton_kernels, "check", lambda device: None)
    assert kernels.triton_on(gpu) is triton_kernels
    assert kernels.triton_on(torch.device("cpu")) is None
    kernels.triton_on.cache_clear()

    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernels, "check", fails)
    assert kernels.triton_on(gpu) is None
    kernels.triton_on.cache_clear()


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "multiply_int8", lambda codes, scales, x: x.new_zeros(1, 2))
    with pytest.raises(ArithmeticError, match=r"wrong on"):
        triton_kernels.check(torch.device(DEVICE))


def test_the_kernels_compile_for_gpus_and_read_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Without a GPU: Triton brings the compiler for them along."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from griffin_offload.quant.triton_kernels import _int4, _int8

forms = [(_int8, "i8", 4, rows) for rows in (1, 2, 4)] + [(_int4, "i32", 1, rows) for rows in (1, 2, 4)]
for kernel, codes, warps, rows in forms:
    step = (4096 if kernel is _int8 else 128) // rows
    for target, dtype in ((75, "fp16"), (80, "bf16"), (90, "bf16"), (90, "fp32"), (120, "bf16")):
        pointers = [f"*{codes}", *[f"*{dtype}"] * 3]
        types = [*pointers, *["i32"] * (len(kernel.arg_names) - 6), "constexpr", "constexpr"]
        whole = [i for i, name in enumerate(kernel.arg_names[:-2]) if name != "tokens"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
        signature = dict(zip(kernel.arg_names, types, strict=True))
        source = triton.compiler.ASTSource(kernel, signature, {"ROWS": rows, "STEP": step}, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
        assert made.asm["cubin"]
        assert "ld.global.v4.b32" in made.asm["ptx"], (kernel, target, dtype)
        assert ".local" not in made.asm["ptx"], (kernel, target, dtype)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
