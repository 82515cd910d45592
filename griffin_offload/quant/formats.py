"""The formats of stored weights, by name."""

from typing import Any

import torch

from ..memory.arena import Arena
from . import onednn as vnni
from .int4 import Int4
from .int8 import Int8, Int8Vnni
from .weight import Dense, Stored

FORMATS: dict[str, Any] = {"": Dense, "int8": Int8, "int4": Int4}


def allocate_weight(format: str, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> Stored:
    """Memory for a matrix (rows, columns) of a model in `dtype`, in one of FORMATS."""
    here = arena.memory.device.type == "cpu" and dtype == torch.bfloat16 and vnni.is_fast()
    if format == "int8" and here and Int8Vnni.fits(rows, columns):
        return Int8Vnni(arena, rows, columns)
    weight: Stored = FORMATS[format](arena, rows, columns, dtype)
    return weight
