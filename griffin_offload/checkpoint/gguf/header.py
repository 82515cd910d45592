"""The header of a GGUF file, checked before any tensor is read; and the fields of a new file as bytes.

gguf's own GGUFReader takes 10 s for a vocabulary of 262144 words, and transformers runs it twice; this takes 0.3 s.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian)."""

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, UnsupportedArchitecture
from ...files import reason
from ...foreign import NAME, shown
from ...units import MIB
from .values import Values

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_HEADER = 256 * MIB  # a vocabulary of 262144 words takes 16
MOST_NUMBERS = 2**16  # of an array that is kept: far more than layers
DEPTH = 4  # arrays in arrays


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is torch's; `kind` is gguf's GGMLQuantizationType; `begin` is an offset in the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    begin: int
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """`fields`: every value, but of arrays of strings (the vocabulary), of arrays and of very many numbers only the
    length.

    `places`: the bytes [begin, end) of each field and its key in the file."""

    path: Path
    fields: Values
    tensors: tuple[GgufTensor, ...]
    places: dict[str, tuple[int, int]]

    def raw(self, key: str) -> bytes:
        """The bytes of a field and its key, for another file's header."""
        begin, end = self.places[key]
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def require_apart(self) -> None:
        """Raises CheckpointError for tensors that overlap."""
        for before, after in pairwise(sorted(self.tensors, key=lambda tensor: tensor.begin)):
            if after.begin < before.begin + before.bytes:
                names = f"{shown(before.name, NAME)} and {shown(after.name, NAME)}"
                raise CheckpointError(f"{self.fields.name} is damaged: {names} overlap; fetch it again")

    def dense(self, tensor: GgufTensor) -> "NDArray[np.float32]":
        """Reads and dequantizes a small tensor: float32, in its shape."""
        import numpy as np
        from gguf import dequantize

        data = np.fromfile(self.path, np.uint8, tensor.bytes, offset=tensor.begin)
        dense: NDArray[np.float32] = dequantize(data, tensor.kind).reshape(tensor.shape)
        return dense


def read_gguf(path: Path, name: str) -> GgufFile:
    """Reads a header; `name` is for errors. Raises CheckpointError for a file that is not GGUF, cut off or damaged,
    UnsupportedArchitecture for one that cannot be read here."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{name} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                fields, tensors, places = _Cursor(blob).header()
                _check_places(tensors, len(blob), name)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{name}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {reason(error)}") from None
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        why = shown(str(error), NAME)
        raise CheckpointError(f"{name} is damaged: its header cannot be read ({why}); fetch it again") from error
    return GgufFile(path, Values(fields, name), tensors, places)


def _check_places(tensors: Sequence[GgufTensor], size: int, name: str) -> None:
    """Raises CheckpointError for tensors that end beyond the file, or have one name."""
    if (end := max((tensor.begin + tensor.bytes for tensor in tensors), default=0)) > size:
        raise CheckpointError(f"{name} is cut off: {size} bytes of {end}; fetch it again")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have one name")


def field_bytes(key: str, value: Any) -> bytes:
    """A field of a new header: bool, int (uint32, or uint64 if large), float (float32), str, or list (ints: int32)."""
    if not isinstance(value, list):
        kind = _kind(value, whole=10 if isinstance(value, int) and value >= 2**32 else 4)
        return string_bytes(key) + struct.pack("<I", kind) + _packed(kind, [value])
    kind = _kind(value[0], whole=5)
    return string_bytes(key) + struct.pack("<IIQ", _ARRAY, kind, len(value)) + _packed(kind, value)


def string_bytes(text: str) -> bytes:
    data = text.encode(errors="replace")  # a folder's name may hold bytes that are no characters
    return struct.pack("<Q", len(data)) + data


def _kind(value: Any, whole: int) -> int:
    return {bool: 7, int: whole, float: 6, str: _STRING}[type(value)]


def _packed(kind: int, values: list[Any]) -> bytes:
    if kind == _STRING:
        return b"".join(map(string_bytes, values))
    return struct.pack(f"<{len(values)}{_NUMBERS[kind]}", *values)


class _Cursor:
    """Reads little-endian values one after another, and checks every length against the file's."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob, self.at = blob, 0

    def header(self) -> tuple[dict[str, Any], tuple[GgufTensor, ...], dict[str, tuple[int, int]]]:
        _, version, tensor_count, field_count = self._read("4sIQQ")
        if version in (2 << 24, 3 << 24):
            raise UnsupportedArchitecture(
                "its numbers are big-endian, for machines such as s390x: take the little-endian file of the model"
            )
        if version not in (2, 3):
            raise ValueError(f"version {version}, not 2 or 3")
        fields: dict[str, Any] = {}
        places = {}
        for _ in range(field_count):
            begin, key = self.at, self._string()
            if key in fields:
                raise ValueError(f"it says {key} twice")
            fields[key] = self._value(self._read("I")[0])
            places[key] = begin, self.at
        table = [self._tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment < 2**32 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        start = -(-self.at // alignment) * alignment  # of the data; offsets count from here
        return fields, tuple(replace(tensor, begin=start + tensor.begin) for tensor in table), places

    def _tensor(self) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, (dimensions,) = self._string(), self._read("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed(self._read(f"{dimensions}Q")))  # the file has them in reverse
        number, offset = self._read("IQ")
        if number not in {*GGMLQuantizationType}:
            raise UnsupportedArchitecture(
                f"{shown(name, NAME)} is of the type {number}, which the gguf package does not know: bring it up to "
                "date, or use the original safetensors"
            )
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or 0 in shape:
            raise ValueError(f"{name} of type {kind.name} has the shape {shape}")
        return GgufTensor(name, shape, kind, offset, prod(shape) // block * block_bytes)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._read(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > DEPTH:
            raise ValueError(f"arrays nested more than {DEPTH} deep" if kind == _ARRAY else f"a value of type {kind}")
        element, count = self._read("IQ")
        if element in _NUMBERS and count <= MOST_NUMBERS:
            return list(self._read(f"{count}{_NUMBERS[element]}"))
        if element in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[element]))
            return count
        for _ in range(count):
            self._skip_string() if element == _STRING else self._value(element, depth + 1)
        return count

    def _read(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        begin = self.at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.blob, begin)

    def _skip_string(self) -> int:
        (length,) = self._read("Q")
        self._skip(length)
        return int(length)

    def _skip(self, length: int) -> None:
        """Raises ValueError beyond the end of the file, or of what a header may be."""
        if length > min(len(self.blob), MAX_HEADER) - self.at:
            raise ValueError(f"{length} bytes at {self.at} of {len(self.blob)}")
        self.at += length

    def _string(self) -> str:
        length = self._skip_string()
        return self.blob[self.at - length : self.at].decode()
