"""The headers of safetensors files -> a TensorInfo for every tensor. No weight is read.

Format: the header's length in 8 bytes, little-endian, the header in JSON, then the data
(https://huggingface.co/docs/safetensors). Everything is checked before it is used.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import reason
from ..foreign import NAME, shown
from ..units import MIB, format_bytes
from .identity import Files, Identity, identities
from .inside import weights_inside
from .which_files import weight_files_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Shape = tuple[int, ...]
# Names that go with weights which other tools have quantized: GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8.
QUANTIZED = (".qweight", ".qzeros", ".absmax", ".SCB", ".weight_packed", ".weight_scale", ".weight_scale_inv")
MAX_HEADER = 100 * MIB  # the format's own limit


@dataclass(frozen=True)
class Encoding:
    """How a tensor of a GGUF file is stored (see gguf/link.StoredTensor): gguf's type, and llama.cpp's changes."""

    kind: str
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Packed:
    """How several tensors hold a quantized weight of this `shape` (see quantized/formats.py): `main` has its numbers,
    `sides` are (role, tensor), `settings` (name, number). Units [first, last) of it are meant (see decode.units)."""

    format: str
    shape: Shape
    main: "TensorInfo"
    sides: tuple[tuple[str, "TensorInfo"], ...]
    settings: tuple[tuple[str, Any], ...]
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint: bytes [begin, end) of `file`. A quantized weight of several tensors is one here, with
    the place of the one that has its numbers.

    If it is encoded, `dtype` is the best one for its numbers in memory. `unknown`: the file's name of a dtype that
    cannot be read; '' for all others."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    encoding: Encoding | Packed | None = None
    unknown: str = ""

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def all_bytes(self) -> int:
        """With the tensors beside it that hold the same weight."""
        beside = self.encoding.sides if isinstance(self.encoding, Packed) else ()
        return self.bytes + sum(info.bytes for _, info in beside)


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors by name, and the total bytes of their files. `said`: a tensor's file, as an index says.

    `pieces`: which of them fill each parameter, where the model's own table does not say so: in a multimodal wrapper,
    whose text model alone is read (and counted). `others`: what else such a wrapper's files hold. `files`: all of the
    folder as they were when it was opened; those of the weights as their headers were read."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    bytes: int
    said: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, list["Piece"]] | None = None
    others: Mapping[str, TensorInfo] = field(default_factory=dict)
    files: Files = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, facts: Mapping[str, Any] | None = None) -> "Checkpoint":
        """Reads and checks the index and every header. `facts`: of config.json, where it has been read. Raises
        CheckpointError."""
        files = identities(folder)  # first: what changes from now on is seen
        found = weight_files_of(folder, facts)
        tensors: dict[str, TensorInfo] = {}
        total = 0
        for name in found.names:
            path = weights_inside(folder, name, found.index)
            infos, files[path] = read_file(path)
            tensors |= {info.name: info for info in infos}  # of a name twice, transformers reads the last
            total += files[path].size
        return cls(folder, tensors, total, found.said, files=files)

    def match(
        self, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str], found: Mapping[str, list["Piece"]]
    ) -> "Matched":
        """Checks the pieces `found` against a model's `shapes`, and finds the parameters that share another's memory.

        `tied`: parameter -> the one that it is tied to. If the files have both, both are read: they may differ. Raises
        CheckpointError for a tensor that is missing or has another shape or dtype."""
        aliases = {}
        for target, source in tied.items():
            if source in found and target not in found:
                aliases[target] = source
            elif target in found and source not in found:
                aliases[source] = target
        missing = [name for name in shapes if name not in found and name not in aliases]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            why = self._why_missing(missing[0])
            raise CheckpointError(f"{self.folder}: the model needs {missing[0]}{more}, which no file holds{why}")
        for name, pieces in found.items():
            whole = torch.empty(shapes[name], device="meta")
            for piece in pieces:
                self._check(piece, name, whole)
            if sum(math.prod(piece.info.shape) for piece in pieces) != whole.numel():
                raise CheckpointError(
                    f"{self.folder}: {name} {list(shapes[name])} is not all there: {len(pieces)} parts"
                )
        return Matched(found, aliases)

    def _why_missing(self, name: str) -> str:
        if name in self.said:
            return f"; the index says that it is in {self.said[name]}"
        marks = [tensor for tensor in self.tensors if tensor.endswith(QUANTIZED)]
        own = next((mark for mark in marks if mark.startswith(name.removesuffix("weight"))), None)
        mark = own or next(iter(marks), None)
        return f"; {shown(mark, NAME)} is there, {self._why_not_read}" if mark else ""

    @property
    def _why_not_read(self) -> str:
        """Why a quantized tensor is not a part of a weight, and the way out."""
        if any(isinstance(info.encoding, Packed) for info in self.tensors.values()):
            return "without all the tensors that hold a quantized weight together: fetch the model again, whole"
        return (
            "and config.json does not say how it is quantized (quantization_config): take the config.json that it was "
            "published with, or use the original weights in bfloat16, float16 or float32"
        )

    def _check(self, piece: "Piece", name: str, whole: torch.Tensor) -> None:
        info, place = piece.info, piece.place
        inside = not place or (isinstance(place[0], int) and place[0] < len(whole)) or isinstance(place[0], slice)
        asked = tuple(whole[place].shape if place else whole.shape) if inside else ()
        if info.unknown or info.dtype not in WEIGHT_DTYPES:
            stored = shown(info.unknown, NAME) or str(info.dtype).removeprefix("torch.")
            raise CheckpointError(f"{info.file}: {info.name} is {stored}, quantized, {self._why_not_read}")
        if info.shape != asked:
            raise CheckpointError(
                f"{info.file}: {info.name} has shape {list(info.shape)}, the config asks for {list(asked)}"
            )


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and its place in a parameter: an index of the leading dimensions; () is the whole."""

    info: TensorInfo
    place: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Matched:
    """`pieces` of each parameter that is read; `aliases`: parameter -> the one whose memory it shares."""

    pieces: Mapping[str, list[Piece]]
    aliases: Mapping[str, str]


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes. Raises CheckpointError."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[list[TensorInfo], Identity]:
    """What `read_header` gives, and which file it was."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as file:
            identity = Identity.of(os.fstat(file.fileno()))
            size = identity.size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                wrong = f"its header would take {format_bytes(length)} of {format_bytes(size)}"
                raise CheckpointError(f"{path} is damaged: {wrong if size >= 8 else f'it holds {size} bytes'}")
            entries = json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise CheckpointError(f"{path} is damaged: its header is not a JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: fetch the model again, or complete the folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: its header is not JSON") from None
    entries.pop("__metadata__", None)
    start = 8 + length
    infos = sorted((_entry(path, start, size, name, e) for name, e in entries.items()), key=lambda i: (i.begin, i.end))
    for before, after in pairwise(infos):
        if after.begin < before.end:
            raise CheckpointError(
                f"{path} is damaged: {shown(before.name, NAME)} and {shown(after.name, NAME)} overlap"
            )
    return infos, identity


def _entry(path: Path, start: int, size: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or not dtype or not isinstance(entry["shape"], list):
            raise ValueError
        if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is damaged: its entry for {shown(name, NAME)} is not of the format") from None
    if start + end > size:
        raise CheckpointError(
            f"{path} is cut short: {shown(name, NAME)} ends at byte {start + end}, the file at {size}; fetch it again"
        )
    if end < begin:
        raise CheckpointError(f"{path} is damaged: {shown(name, NAME)} ends before it begins")
    if dtype not in DTYPES:  # no matter, unless the model needs the tensor
        return TensorInfo(name, torch.uint8, shape, path, start + begin, start + end, unknown=dtype)
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path} is damaged: {shown(name, NAME)} {list(shape)} in {dtype} has {end - begin} bytes from its offsets"
        )
    return TensorInfo(name, DTYPES[dtype], shape, path, start + begin, start + end)
