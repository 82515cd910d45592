"""Tensors cut into pieces of work: together they fill what one read of all of them fills."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors_files import layout, random_tensors, same
from torch import Tensor

from griffin_offload.checkpoint.gguf.blocks import block_type
from griffin_offload.checkpoint.headers import Encoding, TensorInfo, read_header
from griffin_offload.checkpoint.parts import pieces, space, unit
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.memory.arena import LARGE, PAGE, Arena

THREADS = 4


def whole(wanted: Mapping[str, TensorInfo], dtype: torch.dtype | None) -> dict[str, Tensor]:
    reader = Reader()
    tensors = {name: torch.zeros(info.shape, dtype=dtype or info.dtype) for name, info in wanted.items()}
    reader.read({wanted[name]: tensor for name, tensor in tensors.items()})
    reader.close()
    return tensors


def in_pieces(
    wanted: Mapping[str, TensorInfo], dtype: torch.dtype | None, room: int, direct: bool = False
) -> tuple[dict[str, Tensor], int]:
    """Every tensor, in pieces of `room` bytes by several threads of one reader; and how many pieces they were."""
    reader = Reader(direct)
    tensors = {name: torch.zeros(info.shape, dtype=dtype or info.dtype) for name, info in wanted.items()}
    targets = {wanted[name]: tensor for name, tensor in tensors.items()}
    copies = {info: torch.zeros_like(tensor) for info, tensor in targets.items()}
    work = pieces(targets, copies, room)
    assert all(space(parts) <= room for parts in work)

    def fill(index: int) -> None:
        arena = Arena(room)
        each = [(part, arena.take(part.shape, part.dtype, part.info.begin % PAGE)) for part in work[index]]
        reader.read({part.info: here for part, here in each})
        for part, here in each:
            part.target.copy_(here)
            assert part.ram is not None
            part.ram.copy_(here)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, range(len(work))))
    reader.close()
    assert reader.bytes == sum(info.bytes for info in wanted.values())
    for info, copy in copies.items():
        same({"copy": copy}, {"copy": targets[info]})
    return tensors, len(work)


@pytest.mark.parametrize("gap", [0, 3])
def test_every_layout_comes_in_pieces_as_whole(tmp_path: Path, gap: int) -> None:
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, random_tensors(), gap))}
    read, count = in_pieces(infos, None, 1024)
    same(read, whole(infos, None))
    assert count > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("gap", [0, 1, 4095])
def test_large_tensors_are_cut_and_converted(tmp_path: Path, gap: int, direct: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{n}": torch.randn(n, generator=generator).bfloat16() for n in (700_001, 3, 900_000, 64, 1)}
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors, gap))}
    read, count = in_pieces(infos, dtype, 2 * LARGE, direct)
    same(read, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert count > 6


def test_a_cut_is_at_the_end_of_a_page(tmp_path: Path) -> None:
    """All of a part between the first and last page of its tensor is read directly."""
    tensors = {"a": torch.zeros(2_000_000, dtype=torch.bfloat16)}
    (info,) = read_header(layout(tmp_path / SINGLE, tensors, gap=8))
    work = pieces({info: tensors["a"]}, {}, 2 * LARGE)
    assert len(work) > 5
    assert all(part.info.end % PAGE == 0 for parts in work[:-1] for part in parts)
    assert [part.info.begin for parts in work[1:] for part in parts] == [p.info.end for q in work[:-1] for p in q]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize(("shape", "heads"), [((96, 512), 0), ((96, 512), 6), ((12, 1024), 3), ((8192,), 4)])
def test_encoded_tensors_are_cut_between_blocks_and_heads(
    tmp_path: Path, kind: str, shape: tuple[int, ...], heads: int
) -> None:
    found, count = block_type(kind), torch.Size(shape).numel()
    stored = torch.randint(0, 100, (count // found.elements * found.bytes,), dtype=torch.uint8)
    if kind == "F32":
        stored = torch.randn(count).view(torch.uint8)
    file = tmp_path / "blocks"
    file.write_bytes(bytes(33) + stored.numpy().tobytes())
    info = TensorInfo("t", torch.bfloat16, shape, file, 33, 33 + len(stored), Encoding(kind, heads, 0.5))
    room = max(2 * PAGE, 2 * PAGE + 4 * unit(info))
    read, pieces_made = in_pieces({"t": info}, torch.float32, room)
    same(read, whole({"t": info}, torch.float32))
    assert pieces_made > 1 or count < room // 4
