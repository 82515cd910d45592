"""Cuts the tensors of files into pieces of work, which several threads can read at once.

A part of a tensor is a tensor of its own: a range of its bytes, or of its blocks if it is encoded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..memory.arena import LARGE, PAGE, padded
from .gguf.blocks import block_type
from .headers import Packed, Shape, TensorInfo
from .quantized import decode as quantized


@dataclass(frozen=True)
class Part:
    """`info`: a tensor of a file, or a part of one; `target`: where it goes, (n,); `ram`: its copy in RAM, (n,), if one
    is kept there."""

    info: TensorInfo
    target: Tensor
    ram: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.target.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype


def pieces(wanted: Mapping[TensorInfo, Tensor], ram: Mapping[TensorInfo, Tensor], room: int) -> list[list[Part]]:
    """Lists of parts that fill all of `wanted`, in the files' order; those of a list fit an arena of `room` bytes.

    Targets and their copies in `ram` are contiguous. Only what cannot be cut is larger."""
    made: list[list[Part]] = []
    free = 0
    for info in sorted(wanted, key=lambda info: (str(info.file), info.begin)):
        target, copy = wanted[info].view(-1), ram[info].view(-1) if info in ram else None
        first, item = 0, target.dtype.itemsize
        while first < len(target):
            last = _cut(info, first, item, free, room)
            if last == first:
                made.append([])
                free = room
                last = _cut(info, first, item, free, room) or first
                last = max(last, first + unit(info))
            made[-1].append(
                Part(part(info, first, last), target[first:last], None if copy is None else copy[first:last])
            )
            free -= padded((last - first) * item)
            first = last
    return made


def space(parts: list[Part]) -> int:
    """Bytes of an arena that holds the parts."""
    return sum(padded(part.target.nbytes) for part in parts)


def part(info: TensorInfo, first: int, last: int) -> TensorInfo:
    """Elements [first, last) of a tensor, in memory's order; both are multiples of `unit(info)`, or the end."""
    count = math.prod(info.shape)
    if (first, last) == (0, count):
        return info
    shape: Shape = (last - first,)
    encoding = info.encoding
    begin, end = (info.begin + info.bytes * element // count for element in (first, last))
    if isinstance(encoding, Packed):
        size = unit(info)
        shape, encoding = quantized.part(encoding, first // size, last // size)
    elif encoding and encoding.heads:
        shape = ((last - first) * info.shape[0] // count, *info.shape[1:])
        encoding = replace(encoding, heads=(last - first) // unit(info))
    return replace(info, shape=shape, begin=begin, end=end, encoding=encoding)


def unit(info: TensorInfo) -> int:
    """Elements that stay together: one, a block, or a head whose rows are interleaved."""
    if not info.encoding:
        return 1
    if isinstance(info.encoding, Packed):
        return math.prod(info.encoding.shape) // quantized.units(info.encoding)
    heads = info.encoding.heads
    return math.prod(info.shape) // heads if heads else block_type(info.encoding.kind).elements


def _cut(info: TensorInfo, first: int, item: int, free: int, room: int) -> int:
    """How far the tensor goes into `free` bytes, from element `first` on: `first` if it is not worth a part."""
    count = math.prod(info.shape)
    if padded((count - first) * item) <= free:
        return count
    elements = max(0, free - PAGE) // item // unit(info) * unit(info)
    if elements * item < min(LARGE, room // 4):
        return first
    if not info.encoding:  # a cut at the end of a page leaves whole pages, which are read directly
        stored = info.dtype.itemsize
        elements -= min((info.begin + (first + elements) * stored) % PAGE // stored, elements - 1)
    return first + elements
