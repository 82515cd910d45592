"""A direct reader that leaves a share of the blocks to the page cache, for other processes."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from disk import leaves_the_cache
from safetensors.torch import save_file
from safetensors_files import same
from torch import Tensor

from griffin_offload.checkpoint import reader as reader_module
from griffin_offload.checkpoint.headers import TensorInfo, read_header
from griffin_offload.checkpoint.page_cache import is_cached
from griffin_offload.checkpoint.reader import DiskBytes, Reader
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.memory.arena import PAGE, Arena, padded
from griffin_offload.units import MIB

TENSORS = {name: torch.randn(3 * MIB, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abcde")}
SIZE = 5 * 12 * MIB
BLOCK = 8 * MIB


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "BLOCK", BLOCK)


@pytest.fixture
def infos(tmp_path: Path) -> dict[str, TensorInfo]:
    save_file(TENSORS, tmp_path / SINGLE)
    return {info.name: info for info in read_header(tmp_path / SINGLE)}


def read(infos: dict[str, TensorInfo], share: float) -> tuple[dict[str, Tensor], int]:
    """The tensors, read with this share of the blocks in the page cache; and what the disk gave, in bytes."""
    arena, disk = Arena(sum(padded(info.bytes) for info in infos.values())), DiskBytes()
    reader = Reader(direct=share < 1, shared=share, disk=disk)
    tensors = {name: arena.take(info.shape, info.dtype, info.begin % PAGE) for name, info in infos.items()}
    reader.read({infos[name]: tensor for name, tensor in tensors.items()})
    reader.close()
    return tensors, disk.total


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_bytes_are_the_same_and_the_next_reader_finds_the_share(infos: dict[str, TensorInfo], share: float) -> None:
    path = infos["a"].file
    leaves_the_cache(path)
    first, cold = read(infos, share)
    again, warm = read(infos, share)
    same(first, TENSORS)
    same(again, TENSORS)
    assert cold == pytest.approx(SIZE, rel=0.02)
    assert warm == pytest.approx((1 - share) * SIZE, abs=2 * BLOCK if 0 < share < 1 else 0.02 * SIZE)


def test_the_blocks_of_a_smaller_share_are_among_those_of_a_larger_one_and_lie_evenly() -> None:
    def blocks(share: float) -> list[int]:
        segments = Reader(direct=True, shared=share)._segments(0, 100 * BLOCK)
        return [begin // BLOCK for begin, _, is_shared in segments if is_shared]

    for smaller, larger in pairwise([0.1, 0.25, 0.5, 0.9]):
        assert set(blocks(smaller)) < set(blocks(larger))
        assert len(blocks(larger)) == pytest.approx(100 * larger, abs=2)
        gaps = [b - a for a, b in pairwise(blocks(smaller))]
        assert max(gaps) <= 2 / smaller


def test_segments_are_all_of_a_range() -> None:
    begin, end = 5 * MIB + 7, 3 * BLOCK + 11
    segments = list(Reader(direct=True, shared=0.5)._segments(begin, end))
    assert [first for first, _, _ in segments] == [begin, *(last for _, last, _ in segments)][:-1]
    assert segments[-1][1] == end


def test_where_nothing_is_read_directly_the_share_stays_in_the_cache_and_the_rest_does_not(
    infos: dict[str, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = infos["a"].file
    leaves_the_cache(path)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    read(infos, 0.5)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    inside = range(1, SIZE // BLOCK - 1)  # of the file's tensors
    cached = {block for block in inside if is_cached(fd, block * BLOCK + MIB, (block + 1) * BLOCK - MIB)}
    os.close(fd)
    segments = list(Reader(direct=True, shared=0.5)._segments(0, SIZE))
    assert cached == {block for block in inside if segments[block][2]}
