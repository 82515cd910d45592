"""An encoded tensor's bytes -> its numbers, some at a time, and where in memory they come to.

D: numbers a row."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..headers import TensorInfo
from .blocks import block_type

CHUNK = 2**19  # numbers at a time: few enough for a core's cache, many enough that calls do not count (measured)
SCRATCH = 8 * CHUNK  # bytes of a decoder: CHUNK numbers in float32, their bits, and what a step takes besides


class Decoder:
    """Memory for a chunk of numbers, kept from one tensor to the next. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._dense = torch.empty(CHUNK)
        self._spare = torch.empty(CHUNK, dtype=torch.uint8)

    def chunks(self, info: TensorInfo, stored: Tensor) -> Iterator[Tensor]:
        """Whole blocks of a tensor, (bytes,) uint8 -> (n,) float32 each, n at most `step(info)`; gone with the next."""
        assert info.encoding
        kind, offset = block_type(info.encoding.kind), info.encoding.offset
        for blocks in stored.view(-1, kind.bytes).split(step(info) // kind.elements):
            count = len(blocks) * kind.elements
            dense = self._dense[:count]
            kind.unpack(blocks, dense.view(-1, kind.elements), self._spare[:count].view(-1, kind.elements))
            yield dense.sub_(offset) if offset else dense


def step(info: TensorInfo) -> int:
    """Numbers to decode at a time: whole blocks, and of interleaved heads some whole ones, or an even part of one."""
    assert info.encoding
    if not info.encoding.heads:
        return CHUNK
    row, half = _row_and_half(info)
    if 2 * half * row <= CHUNK:
        return CHUNK // (2 * half * row) * 2 * half * row
    return 2 * row * max(p for p in range(1, half) if half % p == 0 and (p == 1 or 2 * p * row <= CHUNK))


def place(info: TensorInfo, target: Tensor, done: int, chunk: Tensor) -> None:
    """Write numbers [done, done + n) of the file's order to their places in `target`, rounding as Tensor.to does."""
    if not info.encoding or not info.encoding.heads:
        target.view(-1)[done : done + len(chunk)] = chunk
        return
    row, half = _row_and_half(info)
    pairs = min(half, step(info) // (2 * row))  # in the file, row i of a head's first half comes before i of its second
    head, first = done // (2 * half * row), done // (2 * row) % half
    parts = chunk.view(-1, pairs, 2, row)
    heads = target.view(-1, 2, half, row)[head : head + len(parts), :, first : first + pairs]
    heads.copy_(parts.transpose(1, 2))


def interleaved(tensor: Tensor, heads: int) -> Iterator[Tensor]:
    """The inverse of `place`: the rows (R, D) or (R,) of some heads as a GGUF file has them, a head at a time."""
    for head in tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1):
        yield head.transpose(0, 1).contiguous()


def _row_and_half(info: TensorInfo) -> tuple[int, int]:
    """D, and half of the rows of a head."""
    assert info.encoding
    return torch.Size(info.shape[1:]).numel(), info.shape[0] // info.encoding.heads // 2
