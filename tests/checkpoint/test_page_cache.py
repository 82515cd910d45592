"""What the page cache has is taken from there, and nothing else is."""

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import leaves_the_cache
from safetensors_files import layout, same
from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.checkpoint.headers import read_header
from griffin_offload.checkpoint.page_cache import is_cached, mostly_cached
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.memory.arena import PAGE, Arena, padded
from griffin_offload.units import MIB

SIZE = 8 * MIB


def file_of(folder: Path, size: int = SIZE) -> Path:
    path = folder / "file"
    path.write_bytes(os.urandom(size))
    return path


def test_what_was_read_is_there_and_what_was_dropped_is_not(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    leaves_the_cache(path)
    assert not mostly_cached([path])
    path.read_bytes()
    assert mostly_cached([path])
    leaves_the_cache(path, 0, SIZE // 2)
    assert not mostly_cached([path]), "a half is not most of it"
    fd = os.open(path, os.O_RDONLY)
    assert is_cached(fd, SIZE // 2, SIZE)
    assert not is_cached(fd, 0, SIZE // 2)
    os.close(fd)


def test_several_files_count_by_their_size_and_no_file_is_not_cached(tmp_path: Path) -> None:
    path, small = file_of(tmp_path), tmp_path / "small"
    small.write_bytes(b"x")
    leaves_the_cache(path)
    assert not mostly_cached([path, small])
    path.read_bytes()
    assert mostly_cached([path, small])
    assert not mostly_cached([])
    assert not mostly_cached([tmp_path / "none"])


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), None])
def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    path = file_of(tmp_path, PAGE)

    def refuse(*args: Any) -> int:
        assert error
        raise error

    if error:
        monkeypatch.setattr(os, "preadv", refuse)
    else:
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    assert not mostly_cached([path])


def test_a_direct_reader_takes_from_the_cache_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors, one in the cache and one not: the same bytes, and direct reads of the second only."""
    tensors = {name: torch.randn(MIB, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    path = layout(tmp_path / SINGLE, tensors)
    infos = {info.name: info for info in read_header(path)}
    leaves_the_cache(path, 4 * MIB)  # pages may be dropped 2 MiB at a time; b begins a little behind
    honest, directly = os.preadv, list[int]()

    def record(fd: int, parts: Any, offset: int, flags: int = 0) -> int:
        count = honest(fd, parts, offset, flags)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            directly.append(offset)
        return count

    monkeypatch.setattr(os, "preadv", record)
    arena, reader = Arena(sum(padded(info.bytes) for info in infos.values())), Reader(direct=True)
    read = {name: arena.take(info.shape, info.dtype, info.begin % PAGE) for name, info in infos.items()}
    reader.read({infos[name]: tensor for name, tensor in read.items()})
    reader.close()
    same(read, tensors)
    if not reader._direct:
        pytest.skip("this file system has no direct reads")
    assert directly
    assert min(directly) >= infos["b"].begin


def test_a_checkpoint_that_the_next_prompt_finds_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one, and a large one that is there now: it is read past the cache if it is not."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", intermediate_size=4096)
    opened = Engine(folder).opened
    assert opened.by_page_cache, "it is small"
    monkeypatch.setattr("griffin_offload.open_model.available_memory", lambda: MIB)
    assert opened.by_page_cache, "it was just written"
    leaves_the_cache(folder / SINGLE)
    assert not opened.by_page_cache
