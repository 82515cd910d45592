"""What our own C++ kernels make of weights, by every set of instructions that this processor has, against torch."""

import pytest
import torch
from kernels import HERE, needs_library, pack
from torch import Tensor

from griffin_offload.checkpoint.gguf import blocks
from griffin_offload.memory.arena import Arena
from griffin_offload.native import weights
from griffin_offload.native.weights import KINDS, rows_to_int4, unpacker
from griffin_offload.quant.int4 import Int4
from griffin_offload.quant.weight import GROUP, Scratch


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HERE)
def test_blocks_give_the_same_bits_as_torch(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """Any bytes: scales that are infinite, NaN or subnormal too."""
    type_ = blocks.BLOCK_TYPES[kind]
    stored = torch.randint(256, (3000, type_.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    outs = []
    rounded = torch.empty(len(stored), type_.elements, dtype=torch.bfloat16)
    for asked in ("none", name):
        monkeypatch.setenv("GRIFFIN_CPU", asked)
        assert (unpacker(kind) is None) == (asked == "none")
        outs.append(torch.full((len(stored), type_.elements), 7.0))
        type_.unpack(stored, outs[-1], torch.empty(outs[-1].shape, dtype=torch.uint8))
    assert outs[0].isfinite().float().mean() > 0.9
    type_.unpack(stored, rounded, torch.empty(rounded.shape, dtype=torch.uint8))
    assert torch.equal(rounded.nan_to_num(nan=1e9), outs[0].bfloat16().nan_to_num(nan=1e9))
    assert torch.equal(outs[0].nan_to_num(nan=1e9), outs[1].nan_to_num(nan=1e9))


def matrices() -> dict[str, Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(100, 200)
    on_grid = torch.randint(16, (64, 4, GROUP)) * torch.rand(64, 4, 1) - torch.rand(64, 4, 1)
    return {
        "normal": normal,
        "outliers": normal * (1 + 5 * (torch.rand(100, 200) > 0.99)),
        "tiny": normal * 1e-9,
        "one row": normal[:1, :7],
        "constant": torch.full((20, 64), 0.1234),
        "zeros": torch.zeros(16, 32),
        "grid": on_grid.view(64, 128),
        "apart": torch.randn(40, 100)[:, :70],
        "transposed": torch.randn(70, 33).t(),
    }


@needs_library
@pytest.mark.parametrize("dtype", weights.SOURCES)
@pytest.mark.parametrize("name", HERE)
def test_rows_give_the_same_int4_as_torch(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("GRIFFIN_CPU", "none")
    for what, matrix in matrices().items():
        rows = matrix.to(dtype)
        n, g = -(-len(rows) // 16), -(-rows.shape[1] // GROUP)
        codes, pairs = torch.empty(16 * n, 16 * g, dtype=torch.uint8), torch.empty(n, g, 16, 2, dtype=torch.bfloat16)
        rows_to_int4(rows, codes, pairs, name)
        expected = by_torch(rows)
        assert torch.equal(pairs.transpose(1, 2).reshape(16 * n, g, 2), expected._scales.transpose(0, 1)), what
        low, high = expected._codes & 15, expected._codes >> 4
        assert torch.equal(codes, pack(torch.cat([low, high], 1))), what


def by_torch(rows: Tensor) -> Int4:
    """In the layout of halves, with scales in bfloat16."""
    weight = Int4(Arena(int(Int4.bytes(*rows.shape, 2))), *rows.shape, torch.float16)
    weight._scales = torch.empty_like(weight._scales, dtype=torch.bfloat16)
    weight.fill(lambda begin, end, _: rows[begin:end], Scratch(rows.shape[1], 4, "cpu"))
    return weight


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["own", "none"])
def test_numbers_that_had_four_bits_lose_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, kernel: str
) -> None:
    if kernel == "none":
        monkeypatch.setenv("GRIFFIN_CPU", "none")
    quantized = blocks.BLOCK_TYPES[kind]
    torch.manual_seed(0)
    stored = torch.randint(256, (64 * 512 // quantized.elements, quantized.bytes), dtype=torch.uint8)
    stored[:, :4] = torch.tensor([0.01, 0.05], dtype=torch.float16).view(torch.uint8)
    if kind == "Q4_0":
        stored[:, 2:4] = torch.randint(256, (len(stored), 2), dtype=torch.uint8)
    matrix = torch.empty(len(stored), quantized.elements)
    quantized.unpack(stored, matrix, torch.empty(matrix.shape, dtype=torch.uint8))
    matrix = matrix.view(64, 512)
    weight = Int4(Arena(int(Int4.bytes(64, 512, 2))), 64, 512, torch.bfloat16)
    weight.fill(lambda begin, end, _: matrix[begin:end].to(dtype), Scratch(512, 4, "cpu"))
    dense = weight.linear(torch.eye(512).bfloat16()).float().T
    assert (dense - matrix).norm() < 0.01 * matrix.norm()  # 0.045 between the extremes
