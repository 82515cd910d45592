"""Reads a checkpoint's bytes into tensors that are allocated already.

Neighbours in a file are read by one run of preadv calls, straight into the tensors' memory. Only tensors of another
dtype, or encoded ones (GGUF), pass through a small bounce buffer.

A direct reader bypasses the page cache, which a checkpoint larger than the memory would fill for nothing. The disk then
writes to the tensors itself, if they are aligned as in the file (see Arena.take). What the page cache has already is
taken from there. A share of the blocks may go through the cache all the same, where other processes find them
(memory/shared_tier.py).
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, PromptError, one_line
from ..files import reason
from ..memory.arena import LARGE, PAGE, Arena
from ..memory.measure import disk_bytes
from ..memory.stage_clock import StageClock
from ..units import MIB
from .gguf.blocks import block_type
from .gguf.decode import SCRATCH, Decoder, place, step
from .headers import Encoding, Packed, TensorInfo
from .identity import OPEN, Files, require_same
from .page_cache import is_cached
from .quantized import decode
from .quantized.rows import Rows
from .quantized.sides import Sides

BOUNCE = 8 * MIB
DECODING = BOUNCE + 2 * SCRATCH  # bytes while encoded tensors are read: one decoder for them, one for embedding rows
WORD = 4  # bytes of the largest number in a block
MAX_PARTS = 512  # below every system's IOV_MAX
READ = 64 * MIB  # bytes a call: large enough for the disk, small enough for an interrupt
BLOCK = 64 * MIB  # of a file: in the page cache as a whole, or not; many times what the system reads ahead
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, lie evenly: the blocks of a smaller share are among a larger one's


@dataclass
class DiskBytes:
    """Bytes that the disk gave, as the system counts them for a thread; elsewhere all that were read."""

    total: int = 0


class Reader:
    """Reads tensors of a checkpoint; counts bytes, those from the disk by `disk`, and seconds by `clock`. Any number of
    threads may read at once: each has buffers of its own, which go with it. `files`: as they were when the checkpoint
    was opened; one that is another by now is refused, so that nothing is read at places that another header told.

    `shared`: this share of the files, 0 to 1, goes through the page cache although the reader is direct."""

    def __init__(
        self,
        direct: bool = False,
        files: Files | None = None,
        shared: float = 0.0,
        disk: DiskBytes | None = None,
    ) -> None:
        self.bytes = 0
        self.disk = disk or DiskBytes()
        self._shared = shared
        self.files = files or {}
        self.clock = StageClock()
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._floods = direct  # if direct reads are not possible, the page cache is emptied after each read
        self._files: dict[tuple[Path, bool], int] = {}
        self._lock = threading.Lock()
        self._own = _Buffers()
        self._sides = Sides(self._whole)

    @property
    def seconds(self) -> float:
        """How long threads read, on average."""
        return self.clock.read

    def read(self, wanted: Mapping[TensorInfo, Tensor]) -> None:
        """Fills each tensor: contiguous, on the CPU, of the info's shape, any float dtype.

        Raises CheckpointError if a file cannot be read, has changed, or is shorter than its header said."""
        start = time.perf_counter()
        for run in runs(wanted):
            together: list[TensorInfo] = []
            for info in run:
                target = wanted[info]
                same = target.dtype == info.dtype and not info.encoding
                if same and not (self._direct and info.bytes >= LARGE):
                    together.append(info)
                elif same and target.data_ptr() % PAGE == info.begin % PAGE:
                    self._read(info.file, info.begin, as_bytes(target))
                elif same and is_cached(self._open(info.file), info.begin, info.end):
                    together.append(info)
                elif isinstance(info.encoding, Packed):
                    self._unpack(info, info.encoding, target)
                else:
                    self._convert(info, target)
            for part in runs(together):
                self._scatter(part[0].file, part[0].begin, [as_bytes(wanted[info]) for info in part])
        self.clock.add("read", time.perf_counter() - start)

    def read_rows(self, info: TensorInfo, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix (R, D) without interleaved heads: (len(rows), D).

        Raises CheckpointError, and PromptError for a row that it does not have."""
        if (wrong := next((row for row in rows if not 0 <= row < info.shape[0]), None)) is not None:
            raise PromptError(f"token {wrong} has no row in {info.name}, which has {info.shape[0]}")
        out = torch.empty(len(rows), info.shape[1], dtype=dtype)
        size = info.bytes // info.shape[0]
        stored = torch.empty(size, dtype=torch.uint8)
        for row, target in zip(rows, out, strict=True):
            self._scatter(info.file, info.begin + row * size, [stored])
            for done, chunk in self._numbers(info, [stored], dtype):
                target[done : done + len(chunk)] = chunk
        return out

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])
        self._own = _Buffers()
        self._sides.clear()

    def pieces(self, info: TensorInfo, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """A tensor's elements in order, as tensors (n,) of `dtype` (default: its own), each valid until the next.

        Raises CheckpointError."""
        assert not (isinstance(info.encoding, Encoding) and info.encoding.heads)
        for _, chunk in self._numbers(info, self._stored(info), dtype or info.dtype):
            yield chunk.to(dtype or info.dtype)

    def _convert(self, info: TensorInfo, target: Tensor) -> None:
        """Reads through the bounce buffer, piece by piece, and rounds to the target's dtype as Tensor.to does."""
        for done, chunk in self._numbers(info, self._stored(info), target.dtype):
            place(info, target, done, chunk)

    def _unpack(self, info: TensorInfo, packed: Packed, target: Tensor) -> None:
        """Reads a quantized weight of several tensors, a few of its stored rows at a time. Raises CheckpointError."""
        buffer = self._own.halves(self.clock)[0]
        try:
            with self._sides.of(packed) as sides:
                for rows in decode.steps(packed, BOUNCE // 2):
                    stored = self._stored_rows(packed, rows, buffer)
                    decode.put(packed, target.view(-1), rows, decode.dense(packed, rows, stored, sides))
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{info.file}: {info.name} cannot be decoded: {one_line(error)}") from None

    def _whole(self, info: TensorInfo) -> Tensor:
        out = torch.empty(info.shape, dtype=info.dtype)
        self._scatter(info.file, info.begin, [as_bytes(out)])
        return out

    def _stored_rows(self, packed: Packed, rows: Rows, buffer: Tensor) -> Tensor:
        """Some rows (or a part of their columns) of the tensor that has a weight's numbers: (n, m), in its dtype."""
        info, item = packed.main, packed.main.dtype.itemsize
        count, width = rows.last - rows.first, decode.row_bytes(packed)
        offset, part = info.begin + rows.first * width, (rows.right - rows.left) * item
        begin = offset % PAGE // item * item
        source = buffer[begin : begin + count * part]
        if part > len(source) // max(1, count):  # a row that is longer than the buffer
            source = torch.empty(count * part, dtype=torch.uint8)
        if part == width:
            self._read(info.file, offset, source)
        else:
            for row, piece in enumerate(source.view(count, part)):
                self._scatter(info.file, offset + row * width + rows.left * item, [piece])
        return source.view(info.dtype).view(count, -1)

    def _numbers(self, info: TensorInfo, stored: Iterable[Tensor], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Stored bytes -> (count of the numbers before, the next numbers (n,)), in the file's order; decoded ones in
        `dtype` where that is quick."""
        done = 0
        for piece in stored:
            if info.encoding:
                assert not isinstance(info.encoding, Packed)
                chunks: Iterable[Tensor] = self._own.decoder(self.clock).chunks(info, piece, dtype)
            else:
                chunks = [piece.view(info.dtype)]
            for chunk in chunks:
                yield done, chunk
                done += len(chunk)

    def _stored(self, info: TensorInfo) -> Iterator[Tensor]:
        """A tensor's bytes, a half of the bounce buffer at a time: whole numbers, or blocks that are decoded together.

        While one half is used, a thread reads into the other."""
        halves, item = self._own.halves(self.clock), info.dtype.itemsize
        unit = item
        if isinstance(info.encoding, Encoding):
            kind = block_type(info.encoding.kind)
            item, unit = WORD, step(info) // kind.elements * kind.bytes
        size = BOUNCE // 2 // unit * unit

        def fetch(number: int) -> Tensor:
            offset = info.begin + number * size
            # Tensors may begin anywhere in a file; torch views numbers only at multiples of their size.
            begin = offset % PAGE // item * item
            source = halves[number % 2, begin : begin + min(size, info.end - offset)]
            self._read(info.file, offset, source)
            return source

        last = (info.bytes - 1) // size
        if last < 1:
            yield fetch(0)
            return
        with ThreadPoolExecutor(1, "griffin-bounce") as ahead:
            coming = ahead.submit(fetch, 0)
            for number in range(last + 1):
                source = coming.result()
                if number < last:
                    coming = ahead.submit(fetch, number + 1)
                yield source

    def _read(self, file: Path, begin: int, target: Tensor) -> None:
        """Reads bytes [begin, begin + n) into `target` (n,), uint8: whole pages directly, but what the page cache has,
        or is to have, from there."""
        for first, last, is_shared in self._segments(begin, begin + target.numel()):
            part = target[first - begin : last - begin]
            if is_shared:
                self._scatter(file, first, [part])
            else:
                self._read_directly(file, first, part)

    def _segments(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """A range of a file in parts (begin, end, whether the page cache is to have it)."""
        if not 0 < self._shared < 1:
            yield begin, end, self._shared > 0
            return
        while begin < end:
            block = begin // BLOCK
            last = min(end, (block + 1) * BLOCK)
            yield begin, last, block * GOLDEN % 1 < self._shared
            begin = last

    def _read_directly(self, file: Path, begin: int, target: Tensor) -> None:
        end = begin + target.numel()
        first, last = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        aligned = self._direct and last > first and not (target.data_ptr() + first - begin) % PAGE
        if not aligned or is_cached(self._open(file), begin, end):
            self._scatter(file, begin, [target])
            return
        head, middle, tail = target.split([first - begin, last - first, end - last])
        self._scatter(file, begin, [head])
        self._scatter(file, last, [tail])
        self._scatter(file, first, [middle], direct=True)

    def _scatter(self, file: Path, offset: int, parts: list[Tensor], direct: bool = False) -> None:
        """Reads one range of a file into several uint8 tensors, in as many calls as the system takes."""
        fd, begin = self._open(file, direct), offset
        views = [part.numpy().data for part in parts if part.numel()]
        while views:
            batch, room = [], READ
            for view in views[:MAX_PARTS]:
                batch.append(view[:room])
                room -= len(batch[-1])
                if not room:
                    break
            before = disk_bytes()
            try:
                count = os.preadv(fd, batch, offset)
            except OSError as error:
                if direct:  # the file system does not read this range directly
                    fd, direct, self._direct = self._open(file), False, False
                    continue
                raise CheckpointError(f"{file} cannot be read: {reason(error)}") from None
            if count == 0:
                require_same(file, os.fstat(fd), self.files)
                raise CheckpointError(f"{file} ends at byte {offset}: it was cut short while it was read")
            if direct and count % PAGE:
                fd, direct = self._open(file), False
            with self._lock:
                self.bytes += count
                self.disk.total += count if before is None else (disk_bytes() or 0) - before
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        require_same(file, os.fstat(fd), self.files)  # after it: what was read before a change is right
        if self._floods and not self._direct and hasattr(os, "posix_fadvise"):
            for first, last, is_shared in self._segments(begin, offset):
                if not is_shared:
                    os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)

    def _open(self, file: Path, direct: bool = False) -> int:
        with self._lock:
            if (file, direct) in self._files:
                return self._files[file, direct]
            try:
                fd = os.open(file, OPEN | (os.O_DIRECT if direct else 0))
            except OSError as error:
                if not direct:
                    raise CheckpointError(f"{file} cannot be opened: {reason(error)}") from None
                self._direct = False
            else:
                self._files[file, direct] = fd
                if self._direct and not direct:  # a few bytes here and there, or whole blocks: no read-ahead
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                return fd
        return self._open(file)


def buffer_bytes(infos: Iterable[TensorInfo], dtype: torch.dtype) -> int:
    """Bytes that a thread needs beside the tensors that it reads, where they become `dtype`."""
    infos = list(infos)
    if packed := [info.encoding for info in infos if isinstance(info.encoding, Packed)]:
        return BOUNCE + 2 * SCRATCH + decode.scratch(packed)
    if any(info.encoding for info in infos):
        return DECODING
    return BOUNCE if any(info.dtype != dtype for info in infos) else 0


class _Buffers(threading.local):
    """What a thread converts and decodes with, made when it first needs it."""

    bounce: Tensor | None = None
    decodes: Decoder | None = None

    def halves(self, clock: StageClock) -> Tensor:
        """Two buffers of BOUNCE / 2 bytes and a page, (2, n), uint8."""
        if self.bounce is None:
            self.bounce = Arena(BOUNCE + 2 * PAGE).take((2, BOUNCE // 2 + PAGE), torch.uint8)
            clock.took(BOUNCE)
        return self.bounce

    def decoder(self, clock: StageClock) -> Decoder:
        if self.decodes is None:
            self.decodes = Decoder()
            clock.took(SCRATCH)
        return self.decodes


def runs(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Groups tensors into runs of neighbours in one file."""
    run: list[TensorInfo] = []
    for info in sorted(infos, key=lambda info: (str(info.file), info.begin, info.end)):
        if run and (info.file != run[-1].file or info.begin != run[-1].end):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as (bytes,), uint8, without a copy. A scalar is one element."""
    return tensor.view(-1).view(torch.uint8)
