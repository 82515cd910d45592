"""Bytes of a checkpoint -> tensors in memory that is there already.

Tensors that lie side by side in a file are read by one sequential run of preadv calls, each scattering into the
tensors' own memory: nothing is copied twice. Where the dtype differs, the run passes through a small bounce buffer.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..units import MIB
from .checkpoint import TensorInfo

BOUNCE = 8 * MIB
MAX_PARTS = 512  # below every system's IOV_MAX
READ = 64 * MIB  # bytes a call: large enough for the disk, small enough that an interrupt is soon seen


class Reader:
    """Reads tensors of a checkpoint; remembers the bytes and the seconds. Not for use by two threads at once."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self._files: dict[Path, int] = {}
        self._bounce: Tensor | None = None

    def read(self, wanted: Mapping[TensorInfo, Tensor]) -> None:
        """Fill each tensor (contiguous, on the CPU, of the info's shape, any float dtype) with its bytes.

        Raises CheckpointError when a file is shorter than its header said, or cannot be read."""
        start = time.perf_counter()
        for run in runs(wanted):
            if all(wanted[info].dtype == info.dtype for info in run):
                self._scatter(run[0].file, run[0].begin, [as_bytes(wanted[info]) for info in run])
            else:
                for info in run:
                    self._convert(info, wanted[info])
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        self._bounce = None

    def _convert(self, info: TensorInfo, target: Tensor) -> None:
        """Read through the bounce buffer, a piece at a time, rounding to the target's dtype as Tensor.to does."""
        if self._bounce is None:
            self._bounce = torch.empty(BOUNCE, dtype=torch.uint8)
        offset, flat = info.begin, target.view(-1)
        for piece in flat.split(BOUNCE // info.dtype.itemsize):
            source = self._bounce[: piece.numel() * info.dtype.itemsize]
            self._scatter(info.file, offset, [source])
            piece.copy_(source.view(info.dtype))
            offset += source.numel()

    def _scatter(self, file: Path, offset: int, parts: list[Tensor]) -> None:
        """One contiguous range of a file into several uint8 tensors, whatever the system returns a call."""
        fd = self._open(file)
        views = [part.numpy().data for part in parts if part.numel()]
        while views:
            batch, room = [], READ
            for view in views[:MAX_PARTS]:
                batch.append(view[:room])
                room -= len(batch[-1])
                if not room:
                    break
            try:
                count = os.preadv(fd, batch, offset)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {offset}: it was cut short while it was read")
            self.bytes += count
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _open(self, file: Path) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from None
        return self._files[file]


def runs(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Group tensors into runs that lie side by side in one file."""
    run: list[TensorInfo] = []
    for info in sorted(infos, key=lambda info: (str(info.file), info.begin, info.end)):
        if run and (info.file != run[-1].file or info.begin != run[-1].end):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as (bytes,), uint8; no copy. A scalar counts as one element."""
    return tensor.view(-1).view(torch.uint8)
