"""Bytes read where they are, in runs and directly: those that safetensors reads."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors_files import everything, layout, random_tensors, refused, same, shards
from torch import Tensor

from griffin_offload.checkpoint.headers import Checkpoint, TensorInfo, read_header
from griffin_offload.checkpoint.reader import Reader, runs
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.memory.arena import LARGE, PAGE, Arena, padded


@pytest.mark.parametrize("seed", [0, 1])
def test_every_layout_is_read_as_safetensors_does(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed)
    path = tmp_path / SINGLE
    save_file(tensors, path)  # sorted and aligned, as the library does
    same(everything({info.name: info for info in read_header(path)}), load_file(path))
    layout(path, tensors)  # as they come
    same(everything({info.name: info for info in read_header(path)}), tensors)
    layout(path, tensors, gap=3)  # which safetensors itself refuses
    same(everything({info.name: info for info in read_header(path)}), tensors)


def test_shards_are_read_as_safetensors_does(tmp_path: Path) -> None:
    tensors = list(random_tensors().items())
    files = {f"model-{i}.safetensors": dict(tensors[i::3]) for i in range(3)}
    folder = shards(tmp_path / "m", files)
    theirs = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    same(everything(Checkpoint.open(folder).tensors), theirs)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_rounded_as_torch_does(tmp_path: Path, target: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8)}
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        exponents = torch.randint(-30, 30, (31, 9), generator=generator)
        values = torch.randn(31, 9, generator=generator, dtype=torch.float64) * 2.0**exponents
        tensors[f"{kind}"] = values.to(kind)
        tensors[f"{kind} edge"] = torch.tensor([0.0, -0.0, float("inf"), 1e-40, 65519.0, 65520.0, 3e38]).to(kind)
        tensors[f"{kind} scalar"], tensors[f"{kind} none"] = torch.tensor(1 / 3, dtype=kind), torch.empty(0, dtype=kind)
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors)) if info.name != "odd"}
    same(everything(infos, target), {name: tensor.to(target) for name, tensor in tensors.items() if name != "odd"})


def test_a_large_tensor_is_converted_piece_by_piece(tmp_path: Path) -> None:
    values = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))  # 20 MB: several bounces
    (info,) = read_header(layout(tmp_path / SINGLE, {"x": values}))
    same(everything({"x": info}, torch.bfloat16), {"x": values.to(torch.bfloat16)})


def test_neighbours_are_one_run(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4) for name in "abcdef"}
    one, two = (read_header(layout(tmp_path / f"{i}.safetensors", tensors)) for i in range(2))
    gaps = read_header(layout(tmp_path / "gaps.safetensors", tensors, gap=1))

    def names(infos: list[TensorInfo]) -> list[str]:
        return ["".join(info.name for info in run) for run in runs(infos)]

    assert names(one) == ["abcdef"]
    assert names(one[::-1]) == ["abcdef"]
    assert names(one[:2] + one[3:]) == ["ab", "def"]
    assert names([one[4], one[0], one[2]]) == ["a", "c", "e"]
    assert names(two + one) == ["abcdef", "abcdef"]
    assert names(gaps) == list("abcdef")
    assert names([]) == []
    empty = {"a": torch.zeros(4), "none": torch.zeros(0), "b": torch.zeros(4)}
    assert names(read_header(layout(tmp_path / "empty.safetensors", empty))) == ["anoneb"]


def test_a_run_is_one_read_however_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{i}": torch.full((3,), float(i)) for i in range(1300)}
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors))}
    calls: list[int] = []
    system = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        calls.append(len(buffers))
        return system(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    same(everything({name: infos[name] for name in list(infos)[:500]}), dict(list(tensors.items())[:500]))
    assert calls == [500]
    same(everything(infos), tensors)
    assert len(calls) == 1 + 3
    assert max(calls) <= 1024, "IOV_MAX"


@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_system_that_returns_less_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    tensors = random_tensors()
    infos = {info.name: info for info in read_header(layout(tmp_path / SINGLE, tensors))}

    def some(fd: int, views: Any, offset: int) -> int:
        data = os.pread(fd, most, offset)
        done = 0
        for view in views:
            piece = data[done : done + len(view)]
            view[: len(piece)] = piece
            done += len(piece)
        return done

    monkeypatch.setattr(os, "preadv", some)
    same(everything(infos), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_cut_after_its_header_was_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = layout(tmp_path / SINGLE, {"x": torch.ones(1000), "y": torch.ones(1000)})
    infos = read_header(path)
    os.truncate(path, path.stat().st_size - 10)
    refused(path, "cut short", call=lambda _: everything({info.name: info for info in infos}, dtype))
    path.unlink()
    refused(path, call=lambda _: everything({info.name: info for info in infos}, dtype))


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Bytes of each direct read that was made, as of files that the page cache lacks; skips where there are none."""
    try:
        (tmp_path / "probe").write_bytes(bytes(PAGE))
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system has no direct reads")
    monkeypatch.setattr("griffin_offload.checkpoint.reader.is_cached", lambda fd, begin, end: False)
    honest, made = os.preadv, list[int]()

    def record(fd: int, parts: list[Any], offset: int) -> int:
        count = honest(fd, parts, offset)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            made.append(count)
        return count

    monkeypatch.setattr(os, "preadv", record)
    return made


def large_tensors() -> dict[str, Tensor]:
    """Two that direct reads are for, small ones around them, and one whose end shares a page with its begin's."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"a": 3, "b": LARGE // 2 + 77, "c": 5, "d": LARGE + 1, "e": 1, "f": LARGE // 2 - 1}
    return {name: torch.randn(size, generator=generator).to(torch.bfloat16) for name, size in sizes.items()}


def read_directly(
    infos: list[TensorInfo], phases: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[Reader, dict[str, Tensor]]:
    arena, reader = Arena(sum(padded(2 * info.bytes) for info in infos)), Reader(direct=True)
    tensors = {i.name: arena.take(i.shape, dtype, i.begin % PAGE if phases else None) for i in infos}
    reader.read({info: tensors[info.name] for info in infos})
    return reader, tensors


@pytest.mark.parametrize("gap", [0, 1, 2, 61, 4095])
@pytest.mark.parametrize("phases", [True, False])
def test_direct_reads_give_the_same_bytes(tmp_path: Path, gap: int, phases: bool, directly: list[int]) -> None:
    infos = read_header(layout(tmp_path / SINGLE, large_tensors(), gap))
    reader, tensors = read_directly(infos, phases)
    reader.close()
    same(tensors, large_tensors())
    assert reader.bytes == sum(info.bytes for info in infos)
    large = [info for info in infos if info.bytes >= LARGE]
    assert [info.name for info in large] == ["b", "d"]
    pages = sum(info.end // PAGE - -(-info.begin // PAGE) for info in large)
    assert sum(directly) == PAGE * pages  # all but what shares a page with a neighbour


def test_direct_reads_are_converted_too(tmp_path: Path, directly: list[int]) -> None:
    infos = read_header(layout(tmp_path / SINGLE, large_tensors(), gap=2))
    _, tensors = read_directly(infos, True, torch.float32)
    same(tensors, {name: tensor.float() for name, tensor in large_tensors().items()})
    assert directly


def test_a_file_system_that_refuses_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directly: list[int]
) -> None:
    """Everything is there all the same, and what was read is dropped from the page cache."""
    infos = read_header(layout(tmp_path / SINGLE, large_tensors()))
    honest, refusals, dropped = os.preadv, list[int](), list[int]()

    def refuse(fd: int, parts: list[Any], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refusals.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return honest(fd, parts, offset)

    def advise(fd: int, offset: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(size)

    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    reader, tensors = read_directly(infos, True)
    reader.close()
    same(tensors, large_tensors())
    assert len(refusals) == 1  # it is not tried again
    assert reader.bytes == sum(info.bytes for info in infos)
    assert sum(dropped) >= infos[3].bytes


def test_a_real_checkpoint_is_read_as_safetensors_does(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    same(everything(checkpoint.tensors), load_file(tiny / SINGLE))


@pytest.mark.real
def test_a_real_model_is_read_as_safetensors_does(smol: Path) -> None:
    checkpoint = Checkpoint.open(smol)
    theirs = {n: t for path in {i.file for i in checkpoint.tensors.values()} for n, t in load_file(path).items()}
    same(everything(checkpoint.tensors), theirs)
