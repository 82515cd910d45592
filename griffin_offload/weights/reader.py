"""Bytes of a checkpoint -> tensors in memory that is there already.

Tensors that lie side by side in a file are read by one sequential run of preadv calls, each scattering into the
tensors' own memory: nothing is copied twice. Where the dtype differs, the run passes through a small bounce buffer.

A direct reader bypasses the page cache, which a checkpoint larger than the memory would flood for nothing: the disk
writes to the tensors, if they lie as in the file (see Arena.take), and no processor copies.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..units import MIB
from .arena import LARGE, PAGE, Arena
from .checkpoint import TensorInfo

BOUNCE = 8 * MIB
MAX_PARTS = 512  # below every system's IOV_MAX
READ = 64 * MIB  # bytes a call: large enough for the disk, small enough that an interrupt is soon seen


class Reader:
    """Reads tensors of a checkpoint; remembers the bytes and the seconds. Not for use by two threads at once."""

    def __init__(self, direct: bool = False) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._floods = direct  # where a direct read is not possible, the page cache is emptied behind the reader
        self._files: dict[tuple[Path, bool], int] = {}
        self._bounce: Tensor | None = None

    def read(self, wanted: Mapping[TensorInfo, Tensor]) -> None:
        """Fill each tensor (contiguous, on the CPU, of the info's shape, any float dtype) with its bytes.

        Raises CheckpointError when a file is shorter than its header said, or cannot be read."""
        start = time.perf_counter()
        for run in runs(wanted):
            together: list[TensorInfo] = []
            for info in run:
                target = wanted[info]
                same = target.dtype == info.dtype
                if same and not (self._direct and info.bytes >= LARGE):
                    together.append(info)
                elif same and target.data_ptr() % PAGE == info.begin % PAGE:
                    self._read(info.file, info.begin, as_bytes(target))
                else:
                    self._convert(info, target)
            for part in runs(together):
                self._scatter(part[0].file, part[0].begin, [as_bytes(wanted[info]) for info in part])
        self.seconds += time.perf_counter() - start

    def read_rows(self, info: TensorInfo, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix (R, D): (len(rows), D), in its own dtype. Raises CheckpointError."""
        out = torch.empty(len(rows), info.shape[1], dtype=info.dtype)
        size = info.shape[1] * info.dtype.itemsize
        for row, target in zip(rows, out, strict=True):
            self._scatter(info.file, info.begin + row * size, [as_bytes(target)])
        return out

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        self._bounce = None

    def pieces(self, info: TensorInfo) -> Iterator[Tensor]:
        """A tensor's elements, in order: (n,) each, in its own dtype, gone with the next. Raises CheckpointError."""
        if self._bounce is None:
            self._bounce = Arena(BOUNCE + PAGE).take((BOUNCE + PAGE,), torch.uint8)
        size = info.dtype.itemsize
        for offset in range(info.begin, info.end, BOUNCE // size * size):
            # A file may set its tensors anywhere; torch views numbers only at multiples of their size.
            begin = offset % PAGE // size * size
            source = self._bounce[begin : begin + min(BOUNCE // size * size, info.end - offset)]
            self._read(info.file, offset, source)
            yield source.view(info.dtype)

    def _convert(self, info: TensorInfo, target: Tensor) -> None:
        """Read through the bounce buffer, a piece at a time, rounding to the target's dtype as Tensor.to does."""
        flat, done = target.view(-1), 0
        for source in self.pieces(info):
            flat[done : done + len(source)] = source
            done += len(source)

    def _read(self, file: Path, begin: int, target: Tensor) -> None:
        """[begin, begin + n) of a file into (n,), uint8: the whole pages directly, what is before and behind not."""
        end = begin + target.numel()
        first, last = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        if not self._direct or last <= first or (target.data_ptr() + first - begin) % PAGE:
            self._scatter(file, begin, [target])
            return
        head, middle, tail = target.split([first - begin, last - first, end - last])
        self._scatter(file, begin, [head])
        self._scatter(file, last, [tail])
        self._scatter(file, first, [middle], direct=True)

    def _scatter(self, file: Path, offset: int, parts: list[Tensor], direct: bool = False) -> None:
        """One contiguous range of a file into several uint8 tensors, whatever the system returns a call."""
        fd, begin = self._open(file, direct), offset
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
                if direct:  # the file system has no direct reads, or this range is not to its taste
                    fd, direct, self._direct = self._open(file), False, False
                    continue
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {offset}: it was cut short while it was read")
            if direct and count % PAGE:
                fd, direct = self._open(file), False
            self.bytes += count
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        if self._floods and not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, begin, offset - begin, os.POSIX_FADV_DONTNEED)

    def _open(self, file: Path, direct: bool = False) -> int:
        if (file, direct) not in self._files:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | (os.O_DIRECT if direct else 0)
            try:
                fd = os.open(file, flags)
            except OSError as error:
                if direct:
                    self._direct = False
                    return self._open(file)
                raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from None
            self._files[file, direct] = fd
            if self._direct and not direct:  # a few bytes here and there: what lies behind them is not wanted
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return self._files[file, direct]


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
