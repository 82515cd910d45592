"""Shards written: safetensors reads what was to be written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors_files import everything, same
from torch import Tensor

from griffin_offload.checkpoint.headers import Checkpoint, read_header
from griffin_offload.checkpoint.safetensors_writer import CheckpointWriter
from griffin_offload.checkpoint.which_files import INDEX, SINGLE

SHAPES = {"a": (3, 5), "scalar": (), "none": (0, 4), "b": (7,), "c": (16, 16), "d": (1,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [2**32, 520, 1])
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_written_safetensors_reads(tmp_path: Path, dtype: torch.dtype, shard: int, order: int) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    with CheckpointWriter(tmp_path, SHAPES, dtype, shard) as writer:
        for name in list(SHAPES)[::order]:
            writer.write(name, tensors[name])
    found = sorted(tmp_path.glob("*.safetensors"))
    assert found == sorted(writer.files)
    assert writer.bytes == sum(path.stat().st_size for path in found)
    read: dict[str, Tensor] = {}
    for path in found:
        read |= load_file(path)
        assert (path.stat().st_size - sum(i.bytes for i in read_header(path))) % 8 == 0, "the data begins aligned"
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    same(read, tensors)
    same(everything(Checkpoint.open(tmp_path).tensors), tensors)
    if shard == 2**32:
        assert [path.name for path in found] == [SINGLE]
        assert not (tmp_path / INDEX).exists()
    else:
        assert len(found) > 1
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for path in found:
            assert {name for name, file in index["weight_map"].items() if file == path.name} == set(load_file(path))
            assert sum(tensor.nbytes for tensor in load_file(path).values()) <= max(shard, 256 * dtype.itemsize)


def test_a_tensor_never_written_or_of_another_shape_or_dtype(tmp_path: Path) -> None:
    def attempt(name: str, *tensors: Tensor) -> None:
        with CheckpointWriter(tmp_path / name, {"a": (2,), "b": (2,)}, torch.float32) as writer:
            for key, tensor in zip("ab", tensors, strict=False):
                writer.write(key, tensor)

    ok = torch.zeros(2)
    for number, tensors in enumerate(([ok], [ok, torch.zeros(3)], [ok, ok.half()], [])):
        (tmp_path / f"{number}").mkdir()
        with pytest.raises(AssertionError):
            attempt(f"{number}", *tensors)


def test_a_writer_left_with_an_error_keeps_that_error_and_closes_its_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, {"a": (2,)}, torch.float32):
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError), CheckpointWriter(tmp_path, {"a": (2,)}, torch.float32):
        pass
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
