"""GGUF's blocks against the gguf package's numpy code, and encoded tensors as the reader fills them, piece by piece."""

import os
from math import prod
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import pytest
import torch
from tiny_gguf import random_blocks
from torch import Tensor

from griffin_offload.checkpoint import reader
from griffin_offload.checkpoint.gguf import decode
from griffin_offload.checkpoint.gguf.blocks import BLOCK_TYPES, block_type
from griffin_offload.checkpoint.headers import Encoding, TensorInfo
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.errors import CheckpointError, UnsupportedArchitecture
from griffin_offload.memory.arena import PAGE

RARER = ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def dense(blocks: Any, kind: str) -> Tensor:
    """The slow, obvious way: (bytes,) uint8 -> (n,) float32."""
    with np.errstate(all="ignore"):
        numbers = ggml.dequantize(np.ascontiguousarray(blocks).reshape(-1), ggml.GGMLQuantizationType[kind])
    return torch.from_numpy(numbers.reshape(-1).copy())


def bits(numbers: Tensor) -> Tensor:
    """float32 as its bits, every NaN the same."""
    return torch.where(numbers.isnan(), torch.nan, numbers).view(torch.int32)


@pytest.mark.parametrize("kind", [*BLOCK_TYPES, *RARER])
@pytest.mark.parametrize("count", [1, 7, 600])
@pytest.mark.parametrize("any_scale", [False, True])
def test_unpacked_as_the_gguf_package_does_to_the_bit(kind: str, count: int, any_scale: bool) -> None:
    found = block_type(kind)
    assert (found.elements, found.bytes) == ggml.GGML_QUANT_SIZES[ggml.GGMLQuantizationType[kind]]
    blocks = random_blocks(kind, count, seed=count)
    if any_scale:  # infinite ones and NaN too
        blocks = np.random.default_rng(count).integers(0, 256, blocks.shape, dtype=np.uint8)
    out, spare = torch.empty(count, found.elements), torch.empty(count, found.elements, dtype=torch.uint8)
    with np.errstate(all="ignore"):
        found.unpack(torch.from_numpy(blocks.copy()), out, spare)
    assert torch.equal(bits(out.flatten()), bits(dense(blocks, kind)))


def test_a_type_that_nobody_unpacks_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"type Q8_1, which cannot be unpacked; use a file of .*Q4_K"):
        block_type("Q8_1")


def stored(
    folder: Path, kind: str, shape: tuple[int, ...], encoding: Encoding | None = None, begin: int = 64
) -> tuple[TensorInfo, Tensor]:
    """A tensor in a file of its own, and its numbers as the model wants them, float32."""
    found = block_type(kind)
    blocks = random_blocks(kind, prod(shape) // found.elements)
    if kind in ("F32", "F16", "BF16"):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        blocks = numbers.to(dtype).view(-1).view(torch.uint8).numpy()
    file = folder / f"{kind}-{begin}.bin"
    file.write_bytes(bytes(begin) + blocks.tobytes() + b"behind")
    encoding = encoding or Encoding(kind)
    values = dense(blocks, kind).view(shape) - encoding.offset
    if heads := encoding.heads:
        values = values.view(heads, shape[0] // heads // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return TensorInfo("t", torch.bfloat16, shape, file, begin, begin + blocks.size, encoding), values


def read(info: TensorInfo, dtype: torch.dtype, direct: bool = False) -> Tensor:
    target, source = torch.full(info.shape, torch.nan, dtype=dtype), Reader(direct)
    source.read({info: target})
    source.close()
    assert source.bytes == info.bytes
    return target


@pytest.mark.parametrize("kind", [*BLOCK_TYPES, "Q3_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direct", [False, True])
def test_the_reader_fills_a_tensor_of_any_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, direct: bool
) -> None:
    """In many pieces, the next of which is read while one is decoded."""
    monkeypatch.setattr(decode, "CHUNK", 2**14)
    monkeypatch.setattr(reader, "BOUNCE", 2**18)
    info, expected = stored(tmp_path, kind, (700, 1024))
    assert torch.equal(read(info, dtype, direct), expected.to(dtype))


@pytest.mark.parametrize("begin", [0, 1, 2, 30, 33, PAGE - 1, PAGE + 96])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K"])
def test_tensors_may_begin_anywhere(tmp_path: Path, kind: str, begin: int) -> None:
    info, expected = stored(tmp_path, kind, (300, 512), begin=begin)
    for direct in (False, True):
        assert torch.equal(read(info, torch.float32, direct), expected)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize(("shape", "heads"), [((24, 256), 3), ((24, 256), 2), ((64, 512), 1), ((12, 1024), 3)])
@pytest.mark.parametrize("chunk", [2048, 4096, 2**19])
def test_interleaved_rows_come_to_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, int], heads: int, chunk: int
) -> None:
    """Heads that fit a chunk, several or one, and those that are cut."""
    monkeypatch.setattr(decode, "CHUNK", chunk)
    monkeypatch.setattr(reader, "BOUNCE", 8 * chunk)
    info, expected = stored(tmp_path, kind, shape, Encoding(kind, heads, 0.5))
    assert decode.step(info) <= chunk
    assert torch.equal(read(info, torch.float32), expected)
    assert torch.equal(read(info, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q6_K"])
def test_rows_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    info, expected = stored(tmp_path, kind, (50, 256), Encoding(kind, 0, 1.0))
    source, rows = Reader(), [3, 0, 49, 3]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(source.read_rows(info, rows, dtype), expected[rows].to(dtype))
    assert source.bytes == 8 * info.bytes // 50
    monkeypatch.setattr(decode, "CHUNK", 1024)
    monkeypatch.setattr(reader, "BOUNCE", 8192)
    parts = [part.clone() for part in Reader().pieces(info, torch.bfloat16)]
    assert len(parts) > 10
    assert torch.equal(torch.cat(parts), expected.flatten().bfloat16())


def test_a_file_cut_short_while_it_is_read_is_told(tmp_path: Path) -> None:
    info, _ = stored(tmp_path, "Q4_0", (64, 64))
    os.truncate(info.file, info.begin + 100)
    with pytest.raises(CheckpointError, match="cut short"):
        read(info, torch.bfloat16)
    info.file.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read(info, torch.bfloat16)
