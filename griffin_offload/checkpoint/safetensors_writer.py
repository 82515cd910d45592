"""Writes safetensors shards whose tensors are known beforehand and come one by one, in any order.

Every offset follows from the shapes, so that a tensor goes straight to its place and none has to be kept.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..memory.arena import PAGE
from ..units import GIB
from .headers import DTYPES, INDEX, SINGLE
from .reader import as_bytes

SHARD = 4 * GIB
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriter:
    """A checkpoint of `shapes` (in this order) below `folder`. Raises OSError where the disk does.

    In one dtype, but for tensors (buffers, usually) that `others` names.

    Use as a context manager; leaving it without an error checks that every tensor was written, and writes the index.
    """

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
        names = (
            [SINGLE]
            if len(groups) == 1
            else [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        )
        self.files = [folder / name for name in names]
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
            for fd in self._fds:
                if kind is None:
                    os.fsync(fd)
        finally:
            self._close()
        if kind is None:
            assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
            if len(self.files) > 1:
                total = {"total_size": sum(self._sizes.values())}
                index = {"metadata": total, "weight_map": self._weight_map}
                (self._folder / INDEX).write_text(json.dumps(index, indent=1))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, contiguous and of the shape announced, in its place."""
        for _ in self.write_pieces(name, [tensor]):
            pass

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> Iterator[int]:
        """Put contiguous pieces, which one behind the other are the tensor, in its place; yields each piece's bytes."""
        fd, offset = self._place[name]
        self._missing.discard(name)
        end = offset + self._sizes[name]
        for piece in pieces:
            assert piece.dtype == self._dtypes[name]
            assert offset + piece.nbytes <= end
            self._write(fd, as_bytes(piece.cpu()).numpy().data, offset)
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
        """Write one file's header; returns where its data begins."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + self._sizes[name]
            entries[name] = {"dtype": NAMES[self._dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)  # the data begins with a page: direct reads need no copy
        self._write(fd, memoryview(len(text).to_bytes(8, "little") + text), 0)
        return 8 + len(text)

    def _write(self, fd: int, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(fd, data, offset)
            self.bytes += count
            data, offset = data[count:], offset + count


def _group(sizes: Mapping[str, int], shard: int) -> list[list[str]]:
    """Tensors in order, as many a shard as its bytes allow, at least one."""
    groups: list[list[str]] = []
    used = shard
    for name, size in sizes.items():
        if used + size > shard:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
