"""Weights in 8 and 4 bits: each format against a slow reference."""

import sys

import pytest
import torch
from rounding import ERROR, ROUNDED, take

from griffin_offload.memory.arena import Arena
from griffin_offload.model.layout import NeuronRows
from griffin_offload.native.library import chosen
from griffin_offload.offload.gather import rows_of
from griffin_offload.options import RESIDENT_DTYPES, RESTS
from griffin_offload.quant import kernels, onednn
from griffin_offload.quant.formats import FORMATS, allocate_weight, kernel
from griffin_offload.quant.precision import precision
from griffin_offload.quant.weight import CHUNK, GROUP, ON_GPU, Scratch


def test_the_options_name_every_format() -> None:
    named = set(FORMATS) - {""}
    assert set(RESIDENT_DTYPES) == {"bfloat16", *named}
    assert set(RESTS) == {"drop", *named}
    assert all(precision(name, "drop").kept == (name if name in named else "") for name in RESIDENT_DTYPES)


def test_the_kernel_of_each_format_on_the_cpu() -> None:
    cpu = {dtype: [kernel(name, "cpu", dtype) for name in FORMATS] for dtype in (torch.bfloat16, torch.float32)}
    quantized = ["oneDNN" if onednn.is_fast() else "torch kernel", "torch kernel"]
    if chosen():
        quantized = [f"own C++ kernel, {chosen()}"] * 2
    assert cpu[torch.bfloat16] == ["torch kernel", *quantized]
    assert cpu[torch.float32] == ["torch kernel", "dense rows", "dense rows"]


def test_a_gpu_without_triton_makes_rows_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "griffin_offload.quant.triton_kernels", raising=False)
    monkeypatch.delattr("griffin_offload.quant.triton_kernels", raising=False)
    assert kernels.triton_on(torch.device("cuda", 6)) is None


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


@pytest.mark.parametrize("name", FORMATS)
def test_packing_takes_no_memory_but_its_scratch(name: str) -> None:
    """Large blocks that come and go would leave holes in the heap, so that no plan knew the peak."""
    matrix, scratch = torch.randn(513, 2048).bfloat16(), Scratch(2048, 2, "cpu")
    weight = allocate_weight(name, Arena(FORMATS[name].bytes(512, 2048, 2)), 512, 2048, torch.bfloat16)
    index = torch.arange(1, 513)
    rows = rows_of(matrix, NeuronRows(0, 513), index, down=False)
    weight.fill(rows, scratch)  # the first takes the scratch, and oneDNN's memory
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        weight.fill(rows, scratch)
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(taken) <= CHUNK * 2048 // GROUP * 4  # a number of float32 for each group
    exact = matrix[index].float()
    assert (weight.linear(torch.eye(2048).bfloat16()).T.float() - exact).norm() < ERROR[name] * exact.norm()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("columns", [320, 500, 1000])
def test_more_rows_at_a_time_as_on_a_gpu_fit_and_are_the_same(name: str, columns: int) -> None:
    matrix, widest, count = torch.randn(2101, columns), 1000, 2100
    rows = rows_of(matrix, NeuronRows(0, count + 1), torch.arange(1, count + 1), down=False)
    made = []
    for device in ("cpu", "gpu"):
        weight = allocate_weight(name, Arena(FORMATS[name].bytes(count, columns, 4)), count, columns, torch.float32)
        scratch = Scratch(widest, 4, device)
        scratch._arena = Arena(Scratch.bytes(widest, 4, device))  # of the CPU
        assert scratch.rows(columns) == (CHUNK if device == "cpu" else ON_GPU * (widest // columns))
        weight.fill(rows, scratch)
        made.append(weight.tensors)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
