"""The table of weight formats."""

from typing import Any

import torch

from ..memory.arena import Arena
from ..native.library import chosen
from . import onednn
from .int4 import Int4
from .int8 import Int8, Int8OneDnn
from .kernels import OWN
from .weight import CHUNK, Dense, Stored

# Name -> class: `bytes(rows, columns, item)`, and (arena, rows, columns, dtype) for its memory. '': the model's dtype.
# The other names are choices of --resident-dtype and --rest (options/).
FORMATS: dict[str, Any] = {"": Dense, "int8": Int8, "int4": Int4}


def allocate_weight(format: str, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> Stored:
    """Memory for a matrix (rows, columns) of a model in `dtype`, in one of FORMATS; int8 by oneDNN where it is fast."""
    on_cpu = arena.memory.device.type == "cpu" and dtype == torch.bfloat16
    if format == "int8" and on_cpu and onednn.is_fast() and Int8OneDnn.fits(rows, columns):
        return Int8OneDnn(arena, rows, columns)
    weight: Stored = FORMATS[format](arena, rows, columns, dtype)
    return weight


def kernel(format: str, device: str, dtype: torch.dtype) -> str:
    """What multiplies one token by a large matrix in one of FORMATS, for a model in `dtype`: 'triton',
    'own C++ kernel, INSTRUCTIONS', 'torch kernel', 'oneDNN', or 'dense rows' (a few rows at a time are made dense).
    Takes some KB on the device for a moment.

    A batch of many tokens is multiplied by dense rows, except by the kernels for the CPU's bfloat16."""
    arena = Arena(int(FORMATS[format].bytes(CHUNK, CHUNK, dtype.itemsize)), device)
    by = allocate_weight(format, arena, CHUNK, CHUNK, dtype).kernel
    return f"{by}, {chosen()}" if by == OWN else by
