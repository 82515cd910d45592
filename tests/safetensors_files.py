"""Safetensors files made by hand, true and false, and their tensors as our reader has them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from griffin_offload.checkpoint.headers import DTYPES, TensorInfo, read_header
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.checkpoint.which_files import INDEX
from griffin_offload.errors import CheckpointError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
DATA = bytes(range(34))


def write(path: Path, header: object, data: bytes = DATA, length: int | None = None) -> Path:
    """A safetensors file: the header is JSON, or bytes as they are; `length` is what the file says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path, *words: str, call: Callable[[Path], object] = read_header) -> None:
    """One line that names the file and the fault; `words` are in it."""
    with pytest.raises(CheckpointError) as caught:
        call(path)
    text = str(caught.value)
    assert path.name in text
    assert text.isprintable(), "one line, and nothing that a terminal would obey"
    assert len(text) < 1000
    for word in words:
        assert word in text


def layout(path: Path, tensors: Mapping[str, Tensor], gap: int = 0) -> Path:
    """A file with the tensors' bytes in this order, unaligned as they come, `gap` bytes before each."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        data += b"\xaa" * gap
        begin = len(data)
        data += raw(tensor)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    return write(path, text + b" " * (len(text) % 2), data)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits (NaN included)."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert raw(ours[name]) == raw(tensor), name


def everything(infos: Mapping[str, TensorInfo], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor, read by a new reader."""
    tensors = {name: torch.empty(info.shape, dtype=dtype or info.dtype) for name, info in infos.items()}
    reader = Reader()
    reader.read({infos[name]: tensor for name, tensor in tensors.items()})
    reader.close()
    assert reader.bytes == sum(info.bytes for info in infos.values())
    return tensors


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """All dtypes of weights and some more, all bit patterns, in an order that aligns nothing."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    kinds = [torch.uint8, torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.float16, torch.int8]
    kinds += [torch.int64, torch.float8_e4m3fn, torch.int32, torch.int16, torch.float8_e5m2]
    for index, shape in enumerate([(7,), (3, 5), (), (1,), (0,), (2, 0, 3), (4, 4, 2), (1, 1, 1, 3), (13,)]):
        for kind in kinds:
            count = torch.Size(shape).numel() * kind.itemsize
            bits = torch.randint(0, 2 if kind == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
            made[f"z{(index * 5) % 9}.{len(made)}.{kind}"] = bits.view(kind).view(shape)
    return made


def shards(folder: Path, files: Mapping[str, Mapping[str, Tensor]], weight_map: object = None) -> Path:
    """A sharded checkpoint; the index is right unless a weight_map is given."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name)
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
