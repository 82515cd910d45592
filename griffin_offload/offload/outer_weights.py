"""Loads what lies outside the decoder layers: embeddings, final norm, lm_head, and buffers that a checkpoint holds."""

from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.reader import Reader
from ..memory.arena import Arena, padded
from ..model.layout import ModelLayout
from ..model.skeleton import Skeleton
from ..quant.formats import FORMATS, allocate_weight
from ..quant.precision import NATIVE, Precision
from ..quant.weight import CHUNK, Scratch, Weight
from .layer_stream import check_finite

READ_ROWS = 8 * CHUNK  # of an lm_head that is quantized as it is read


def load_outer_weights(skeleton: Skeleton, reader: Reader, device: str, precision: Precision = NATIVE) -> None:
    """Read them to the device. An lm_head in fewer bits is quantized as it is read, and its embedding stays on disk.

    Raises NumericError for NaN or infinite weights."""
    layout, slots = skeleton.layout, skeleton.slots
    head = layout.quantizable_head if precision.head else None
    slots.quantize_lm_head(None)
    left = {layout.table}
    if head:
        left |= {layout.aliases.get(name, name) for name in (head, layout.embedding)}
    names = [name for name in layout.outer if name not in left]
    arena = Arena(sum(padded(torch.Size(layout.shapes[name]).numel() * layout.dtype.itemsize) for name in names))
    tensors = {name: arena.take(layout.shapes[name], layout.dtype, layout.phase(name)) for name in names}
    buffers = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.buffers.items()}
    reader.read(layout.reads(tensors | buffers))
    for name, tensor in tensors.items():
        check_finite(layout, name, tensor)
        slots.assign(name, tensor.to(device))
    for name, buffer in buffers.items():
        skeleton.model.get_buffer(name).copy_(buffer)
    if layout.table:
        slots.assign(layout.table, slots.empty_embedding(device).data)
    if head:
        slots.quantize_lm_head(_quantized_head(layout, reader, head, device, precision.head))


def _quantized_head(layout: ModelLayout, reader: Reader, name: str, device: str, format: str) -> Weight:
    """The lm_head, read and quantized a few rows at a time: it is never whole in memory."""
    rows, columns = layout.shapes[name]
    arena = Arena(FORMATS[format].bytes(rows, columns, layout.dtype.itemsize), device)
    weight = allocate_weight(format, arena, rows, columns, layout.dtype)
    info = layout.source(name)[0].info
    size = info.bytes // rows
    buffer = torch.empty(READ_ROWS, columns, dtype=layout.dtype)
    here = (0, 0)

    def read(begin: int, end: int, _: Scratch) -> Tensor:
        nonlocal here
        if end > here[1]:
            here = begin, min(begin + READ_ROWS, rows)
            first, last = info.begin + begin * size, info.begin + here[1] * size
            part = replace(info, shape=(here[1] - begin, columns), begin=first, end=last)
            reader.read({part: buffer[: here[1] - begin]})
            check_finite(layout, name, buffer[: here[1] - begin])
        return buffer[begin - here[0] : end - here[0]].to(device)

    weight.fill(read, Scratch(columns, layout.dtype.itemsize, device))
    return weight
