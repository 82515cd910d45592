"""Loads what lies outside the decoder layers: embeddings, final norm, lm_head."""

from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.reader import Reader
from ..memory.arena import Arena, padded
from ..model.skeleton import Skeleton
from ..quant.formats import FORMATS, allocate_weight
from ..quant.precision import NATIVE, Precision
from ..quant.weight import CHUNK, Scratch, Weight
from .layer_stream import check_finite

READ_ROWS = 8 * CHUNK  # of a head that is packed as it is read


def load_outer_weights(skeleton: Skeleton, reader: Reader, device: str, precision: Precision = NATIVE) -> None:
    """Read embeddings, final norm and head to the device, and buffers that a checkpoint holds. A head that is packed
    is packed as it is read, and the table stays in its file.

    Raises NumericError for NaN or infinite weights."""
    head = skeleton.head if precision.head else None
    skeleton.pack_head(None)
    left = {skeleton.table}
    if head:
        left |= {skeleton.aliases.get(name, name) for name in (head, skeleton.table_name)}
    names = [name for name in skeleton.outer if name not in left]
    arena = Arena(sum(padded(torch.Size(skeleton.shapes[name]).numel() * skeleton.dtype.itemsize) for name in names))
    tensors = {name: arena.take(skeleton.shapes[name], skeleton.dtype, skeleton.phase(name)) for name in names}
    buffers = {name: torch.empty_like(buffer, device="cpu") for name, buffer in skeleton.buffers.items()}
    reader.read(skeleton.reads(tensors | buffers))
    for name, tensor in tensors.items():
        check_finite(skeleton, name, tensor)
        skeleton.assign(name, tensor.to(device))
    for name, buffer in buffers.items():
        skeleton.model.get_buffer(name).copy_(buffer)
    if skeleton.table:
        skeleton.assign(
            skeleton.table, torch.empty(0, skeleton.config.hidden_size, dtype=skeleton.dtype, device=device)
        )
    if head:
        skeleton.pack_head(_packed_head(skeleton, reader, head, device, precision.head))


def _packed_head(skeleton: Skeleton, reader: Reader, name: str, device: str, format: str) -> Weight:
    """The head, read and packed a few rows at a time: it is never whole in memory."""
    rows, columns = skeleton.shapes[name]
    arena = Arena(FORMATS[format].bytes(rows, columns, skeleton.dtype.itemsize), device)
    weight = allocate_weight(format, arena, rows, columns, skeleton.dtype)
    info = skeleton.pieces[skeleton.aliases.get(name, name)][0].info
    size = info.bytes // rows
    buffer = torch.empty(READ_ROWS, columns, dtype=skeleton.dtype)
    here = (0, 0)

    def read(begin: int, end: int, _: Scratch) -> Tensor:
        nonlocal here
        if end > here[1]:
            here = begin, min(begin + READ_ROWS, rows)
            part = replace(
                info, shape=(here[1] - begin, columns), begin=info.begin + begin * size, end=info.begin + here[1] * size
            )
            reader.read({part: buffer[: here[1] - begin]})
            check_finite(skeleton, name, buffer[: here[1] - begin])
        return buffer[begin - here[0] : end - here[0]].to(device)

    weight.fill(read, Scratch(columns, skeleton.dtype.itemsize, device))
    return weight
