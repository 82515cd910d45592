"""The headers of safetensors files -> a TensorInfo for every tensor. No weight is read.

Format: the header's length in 8 bytes, little-endian, the header in JSON, then the data
(https://huggingface.co/docs/safetensors). Everything is checked before it is used.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import reason
from ..units import MIB, format_bytes

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
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Shape = tuple[int, ...]
MAX_HEADER = 100 * MIB  # the format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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

    If it is encoded, `dtype` is the best one for its numbers in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    encoding: Encoding | Packed | None = None

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
    """A folder's tensors by name, and the total bytes of their files.

    `pieces`: which of them fill each parameter, where the model's own table does not say so: in a multimodal wrapper,
    whose text model alone is read (and counted)."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    bytes: int
    pieces: Mapping[str, list["Piece"]] | None = None

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads and checks the index and every header. Raises CheckpointError."""
        weight_map = _weight_map(folder)
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        tensors: dict[str, TensorInfo] = {}
        total = 0
        for name in files:
            path = _inside(folder, name)
            for info in read_header(path):
                if info.name in tensors:
                    raise CheckpointError(f"{info.name} is in both {tensors[info.name].file.name} and {name}")
                tensors[info.name] = info
            total += path.stat().st_size
        for tensor, name in weight_map.items():
            if tensor not in tensors or tensors[tensor].file.name != Path(name).name:
                raise CheckpointError(f"{folder / INDEX} says that {tensor} is in {name}, but it is not there")
        return cls(folder, tensors, total)

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
            raise CheckpointError(f"{self.folder}: the model needs {missing[0]}{more}, which no file holds")
        for name, pieces in found.items():
            whole = torch.empty(shapes[name], device="meta")
            for piece in pieces:
                self._check(piece, name, whole)
            if sum(math.prod(piece.info.shape) for piece in pieces) != whole.numel():
                raise CheckpointError(
                    f"{self.folder}: {name} {list(shapes[name])} is not all there: {len(pieces)} parts"
                )
        return Matched(found, aliases)

    def _check(self, piece: "Piece", name: str, whole: torch.Tensor) -> None:
        info, place = piece.info, piece.place
        inside = not place or (isinstance(place[0], int) and place[0] < len(whole)) or isinstance(place[0], slice)
        asked = tuple(whole[place].shape if place else whole.shape) if inside else ()
        if info.shape != asked:
            raise CheckpointError(
                f"{info.file}: {info.name} has shape {list(info.shape)}, the config asks for {list(asked)}"
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info.file}: {info.name} is {info.dtype}, a quantized checkpoint; "
                "use the original in bfloat16, float16 or float32"
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
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
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
            raise CheckpointError(f"{path} is damaged: {_shown(before.name)} and {_shown(after.name)} overlap")
    return infos


def _shown(text: str) -> str:
    """Text of a file that is not trusted -> one short line."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _entry(path: Path, start: int, size: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or not isinstance(entry["shape"], list):
            raise ValueError
        if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is damaged: its entry for {_shown(name)} is not of the format") from None
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: {_shown(name)} has the unknown dtype {_shown(dtype)}; known: {known}")
    if start + end > size:
        raise CheckpointError(
            f"{path} is cut short: {_shown(name)} ends at byte {start + end}, the file at {size}; fetch it again"
        )
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path} is damaged: {_shown(name)} {list(shape)} in {dtype} has {end - begin} bytes from its offsets"
        )
    return TensorInfo(name, DTYPES[dtype], shape, path, start + begin, start + end)


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: tensor -> file name. Empty for a single file. Raises CheckpointError."""
    path = folder / INDEX
    if not path.exists():
        if (folder / SINGLE).exists():
            return {}
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; Griffin reads safetensors only")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it has no weight_map from tensor names to file names") from None
    return dict(weight_map)


def _inside(folder: Path, name: str) -> Path:
    """The path of the file `name` in `folder`. Raises CheckpointError for a file elsewhere.

    In the hub's cache, links from snapshots/ to blobs/ of the same model are followed."""
    path = folder / name
    root = folder.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    try:
        stays = name.isprintable() and any(path.resolve().is_relative_to(place) for place in allowed)
    except (OSError, RuntimeError, ValueError):  # a link to itself; RuntimeError before Python 3.13
        raise CheckpointError(f"{path} cannot be opened: its links have no end") from None
    if not stays:
        what = f"{folder / INDEX} names {_shown(name)}" if name != SINGLE else f"{path} is a link"
        raise CheckpointError(f"{what}, which leaves the folder; do not trust this checkpoint")
    return path
