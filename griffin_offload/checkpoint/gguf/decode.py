"""Decodes a GGUF tensor's bytes, some blocks at a time, and puts the numbers in their places. D: numbers a row."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..headers import Encoding, TensorInfo
from .blocks import block_type

CHUNK = 2**19  # numbers at a time: they fit a core's cache, and calls cost nothing (measured)
SCRATCH = 8 * CHUNK  # bytes of a decoder: CHUNK numbers in float32, their bits, and a step's temporaries


class Decoder:
    """Decodes into memory that it keeps from one tensor to the next. For one thread at a time."""

    def __init__(self) -> None:
        self._dense = torch.empty(CHUNK)  # or twice as many halves
        self._spare = torch.empty(CHUNK, dtype=torch.uint8)

    def chunks(self, info: TensorInfo, stored: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Whole blocks, (bytes,) uint8 -> tensors (n,), in `dtype` or float32, n at most `step(info)`, each valid until
        the next."""
        assert isinstance(info.encoding, Encoding)
        kind, offset = block_type(info.encoding.kind), info.encoding.offset
        memory = self._dense.view(dtype) if not offset and kind.unpacks_to(dtype) else self._dense
        for blocks in stored.view(-1, kind.bytes).split(step(info) // kind.elements):
            count = len(blocks) * kind.elements
            dense = memory[:count]
            kind.unpack(blocks, dense.view(-1, kind.elements), self._spare[:count].view(-1, kind.elements))
            yield dense.sub_(offset) if offset else dense


def step(info: TensorInfo) -> int:
    """Numbers to decode at a time: whole blocks; of interleaved heads whole ones, or an even part of one."""
    assert isinstance(info.encoding, Encoding)
    if not info.encoding.heads:
        return CHUNK
    row, half = _row_and_half(info)
    if 2 * half * row <= CHUNK:
        return CHUNK // (2 * half * row) * 2 * half * row
    return 2 * row * max(p for p in range(1, half) if half % p == 0 and (p == 1 or 2 * p * row <= CHUNK))


def place(info: TensorInfo, target: Tensor, done: int, chunk: Tensor) -> None:
    """Writes numbers [done, done + n), in the file's order, to their places in `target`, rounded as by Tensor.to."""
    if not isinstance(info.encoding, Encoding) or not info.encoding.heads:
        target.view(-1)[done : done + len(chunk)] = chunk
        return
    row, half = _row_and_half(info)
    pairs = min(
        half, step(info) // (2 * row)
    )  # in the file, row i of a head's first half is before row i of its second
    head, first = done // (2 * half * row), done // (2 * row) % half
    parts = chunk.view(-1, pairs, 2, row)
    heads = target.view(-1, 2, half, row)[head : head + len(parts), :, first : first + pairs]
    heads.copy_(parts.transpose(1, 2))


def interleaved(tensor: Tensor, heads: int) -> Iterator[Tensor]:
    """Rows (R, D) or (R,) of some heads -> each head's rows in a GGUF file's order: the inverse of `place`."""
    for head in tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1):
        yield head.transpose(0, 1).contiguous()


def _row_and_half(info: TensorInfo) -> tuple[int, int]:
    """D, and half of the rows of a head."""
    assert isinstance(info.encoding, Encoding)
    return torch.Size(info.shape[1:]).numel(), info.shape[0] // info.encoding.heads // 2
