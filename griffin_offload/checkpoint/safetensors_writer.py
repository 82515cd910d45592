"""Writes safetensors shards, tensor by tensor in any order: all offsets follow from the shapes."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import check_same, write_at
from ..memory.arena import PAGE
from ..units import GIB
from .headers import DTYPES
from .reader import as_bytes
from .which_files import INDEX, SINGLE

SHARD = 4 * GIB
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriter:
    """A checkpoint of `shapes`, in this order, in `folder`: in `dtype`, but for tensors that `others` names.

    A context manager: without an error it checks at the end that every tensor was written, and writes the index. Raises
    OSError."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        shard: int = SHARD,
        others: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.bytes = 0
        self._folder = folder
        self._dtypes = {name: (others or {}).get(name, dtype) for name in shapes}
        self._sizes = {name: math.prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items()}
        groups = _group(self._sizes, shard)
        count = len(groups)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        self.files = [folder / name for name in (names if count != 1 else [SINGLE])]
        self._place: dict[str, tuple[int, int]] = {}
        self._missing = set(shapes)
        self._fds: list[int] = []
        try:
            for path, group in zip(self.files, groups, strict=True):
                self._begin(path, {name: shapes[name] for name in group})
        except BaseException:
            self._close()
            raise
        self._weight_map = {name: path.name for path, group in zip(self.files, groups, strict=True) for name in group}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                for fd, path in zip(self._fds, self.files, strict=True):
                    os.fsync(fd)
                    check_same(fd, path)
        finally:
            self._close()
        if kind is None:
            assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
            if len(self.files) > 1:
                total = {"total_size": sum(self._sizes.values())}
                index = {"metadata": total, "weight_map": self._weight_map}
                (self._folder / INDEX).write_text(json.dumps(index, indent=1))

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a contiguous tensor of its announced shape to its place."""
        for _ in self.write_pieces(name, [tensor]):
            pass

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> Iterator[int]:
        """Writes a tensor in contiguous pieces, in order, to its place; yields each piece's bytes."""
        fd, offset = self._place[name]
        self._missing.discard(name)
        end = offset + self._sizes[name]
        for piece in pieces:
            assert piece.dtype == self._dtypes[name]
            assert offset + piece.nbytes <= end
            write_at(fd, as_bytes(piece.cpu()).numpy().data, offset)
            self.bytes += piece.nbytes
            offset += piece.nbytes
            yield piece.nbytes
        assert offset == end

    def _begin(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._fds.append(fd)
        offset = self._header(fd, shapes)
        for name in shapes:
            self._place[name] = (fd, offset)
            offset += self._sizes[name]

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _header(self, fd: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Writes one file's header; returns the offset of its data."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + self._sizes[name]
            entries[name] = {"dtype": NAMES[self._dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)  # the data begins with a page: direct reads need no copy
        write_at(fd, memoryview(len(text).to_bytes(8, "little") + text), 0)
        self.bytes += 8 + len(text)
        return 8 + len(text)


def _group(sizes: Mapping[str, int], shard: int) -> list[list[str]]:
    """Names of the tensors of each shard: in order, at least one, and otherwise at most `shard` bytes."""
    groups: list[list[str]] = []
    used = shard
    for name, size in sizes.items():
        if used + size > shard:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
