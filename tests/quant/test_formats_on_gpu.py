"""Quantized products on a GPU; skipped without CUDA."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import CARDS
from rounding import assert_product, dequantized
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.memory.arena import Arena
from griffin_offload.quant.formats import FORMATS, allocate_weight
from griffin_offload.quant.joined import take_joined
from griffin_offload.quant.weight import CHUNK, Scratch
from griffin_offload.units import MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="torch for Windows comes without Triton")


def quantized(name: str, matrix: torch.Tensor) -> Any:
    """A matrix of the GPU, in a format."""
    rows, columns = matrix.shape
    arena = Arena(FORMATS[name].bytes(rows, columns, matrix.dtype.itemsize), "cuda")
    weight = allocate_weight(name, arena, rows, columns, matrix.dtype)
    weight.fill(lambda begin, end, _: matrix[begin:end], Scratch(columns, matrix.dtype.itemsize, "cuda"))
    return weight


@needs_triton
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4110, 5120), (2050, 1100), (300, 50)])
def test_few_tokens_are_multiplied_by_triton_and_many_by_dense_rows(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight = quantized(name, torch.randn(shape, device="cuda").to(dtype))
    assert weight.kernel == "triton"
    matrix = dequantized(weight, *shape)
    torch.mm(*torch.ones(2, 8, 8, dtype=dtype, device="cuda"))  # cuBLAS takes its workspace: 32 MiB on Hopper
    for tokens in (1, 2, 16, 100):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = weight.linear(x)
        peak, item = torch.cuda.max_memory_allocated() - before, dtype.itemsize
        dense = 4 * CHUNK * shape[1] * (2 + item) if tokens > 16 else 0
        assert peak < dense + 2 * tokens * sum(shape) * item + 10 * MIB  # cuBLAS's workspace: 8.1 MiB
        if tokens <= 16:
            assert_product(out, x, matrix)
        else:
            exact = x.cpu().double() @ matrix.T
            assert (out.cpu().double() - exact).norm() < max(1e-3, 2 * torch.finfo(dtype).eps) * exact.norm()


@pytest.mark.parametrize(("resident_dtype", "rest"), [("int8", "int4"), ("int4", "drop")])
def test_answers_in_fewer_bits_are_the_cpus(tmp_path: Path, resident_dtype: str, rest: str) -> None:
    folder, asked = tiny_checkpoint(tmp_path, "llama"), {"resident_dtype": resident_dtype, "rest": rest}
    here, there = (
        Engine(folder, device=device, dtype="float32")
        .generate(tiny_prompt(), sparsity=0.5, max_new_tokens=8, do_sample=False, **asked)
        .token_ids
        for device in ("cpu", "cuda")
    )
    assert here == there


@needs_triton
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_graph_records_joined_products_and_replays_them_with_other_tokens(name: str) -> None:
    torch.manual_seed(0)
    matrices, rows = [torch.randn(count, 640, device="cuda").bfloat16() for count in (128, 64)], [128, 64]
    arena = Arena(sum(FORMATS[name].bytes(count, 640, 2) for count in rows), "cuda")
    parts = take_joined(name, arena, rows, 640, torch.bfloat16)
    for part, matrix in zip(parts, matrices, strict=True):
        part.fill(lambda begin, end, _, m=matrix: m[begin:end], Scratch(640, 2, "cuda"))

    def step(token: torch.Tensor) -> torch.Tensor:
        x = token * 2
        return torch.cat([part.linear(x) for part in parts], -1)

    token, graph, stream = torch.randn(1, 1, 640, device="cuda").bfloat16(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(token)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = step(token)
        for _ in range(3):
            token.copy_(torch.randn_like(token))
            graph.replay()
            assert torch.equal(out, step(token))


@needs_triton
@pytest.mark.skipif(CARDS > 0, reason="an emulated card has no speed")
@pytest.mark.parametrize("shape", [(13824, 5120), (5120, 6912)])
def test_one_token_is_never_slower_than_bfloat16(shape: tuple[int, int]) -> None:
    matrix, x = torch.randn(shape, device="cuda").bfloat16(), torch.randn(1, shape[1], device="cuda").bfloat16()
    times = {}
    for name in FORMATS:
        weights = [quantized(name, matrix) for _ in range(6)]  # more than the GPU's cache holds
        times[name] = microseconds(lambda w=weights: [weight.linear(x) for weight in w]) / len(weights)
    assert max(times["int8"], times["int4"]) < times[""], times


def microseconds(work: Callable[[], object]) -> float:
    """Of the GPU's time, without Python's: the least of ten replays of a graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    found = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1000 * begin.elapsed_time(end))
    return min(found)
