"""Writes a GGUF file, tensor by tensor in any order: all offsets follow from the shapes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian). The gguf package's writer
wants whole tensors, in order.
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ExportError
from ...files import check_same, write_at
from ...memory.arena import ALIGN
from ..reader import as_bytes
from .decode import CHUNK
from .header import field_bytes, string_bytes

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """A file's header, its size in bytes, and by tensor name: type, first byte and bytes."""

    header: bytes
    places: Mapping[str, tuple[str, int, int]]
    bytes: int


def layout(fields: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Layout:
    """Lays a file out. `fields`: values for header.field_bytes, or bytes from another file's header; `tensors`: torch's
    shape and gguf's type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    fields = {**fields, "general.alignment": ALIGN}  # from there our reader reads without a copy
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(v if isinstance(v, bytes) else field_bytes(key, v) for key, v in fields.items())
    table, offset, places = [], 0, {}
    for name, (shape, kind) in tensors.items():
        number = GGMLQuantizationType[kind]
        block, block_bytes = GGML_QUANT_SIZES[number]
        assert shape[-1] % block == 0
        size = math.prod(shape) // block * block_bytes
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table.append(string_bytes(name) + dimensions + struct.pack("<IQ", number, offset))
        places[name] = kind, offset, size
        offset += size + -size % ALIGN
    header += b"".join(table)
    start = len(header) + -len(header) % ALIGN
    return Layout(header, {n: (kind, start + at, size) for n, (kind, at, size) in places.items()}, start + offset)


class GgufWriter:
    """A new file `path`. A context manager: without an error it checks at the end that every tensor was written.

    Raises OSError, and ExportError for numbers beyond a type's range."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._places, self._missing = layout.places, set(layout.places)
        self._path, self._header = path, len(layout.header)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self.write_header(layout)
            os.ftruncate(self._fd, layout.bytes)  # so that the header can be read back before the tensors are there
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "GgufWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
                check_same(self._fd, self._path)
        finally:
            os.close(self._fd)
        if kind is None:
            assert not self._missing, f"never written: {sorted(self._missing)[:3]}"

    def write_header(self, layout: Layout) -> None:
        """Writes the header; again with other values, as long as the first."""
        assert len(layout.header) == self._header
        write_at(self._fd, memoryview(layout.header), 0)

    def write_pieces(self, name: str, pieces: Iterable[Tensor], offset: float = 0.0) -> Iterator[int]:
        """Writes a tensor in contiguous pieces of whole blocks, in order; yields each piece's bytes.

        `offset` is added to every number."""
        kind, at, size = self._places[name]
        self._missing.discard(name)
        end = at + size
        for piece in pieces:
            begin = at
            for part in piece.view(-1).split(CHUNK):  # so that encoding takes little memory
                data = _encoded(part.float() + offset if offset else part, kind, name)
                assert at + len(data) <= end
                write_at(self._fd, data, at)
                at += len(data)
            yield at - begin
        assert at == end


def _encoded(part: Tensor, kind: str, name: str) -> memoryview:
    """Numbers (n,), any float dtype -> bytes of one of gguf's types."""
    if kind in DTYPES:
        dense = part.to(DTYPES[kind])
        if kind == "F16" and not torch.isfinite(dense).all():
            raise ExportError(f"{name} holds numbers beyond the range of f16: use the type bf16")
        return as_bytes(dense).numpy().data
    from gguf import GGMLQuantizationType, quantize

    return memoryview(quantize(part.float().numpy(), GGMLQuantizationType[kind]).reshape(-1)).cast("B")
