"""FP4 in compressed-tensors: NVFP4 (groups of 16, scales in FP8, and one scale for all of them) and MXFP4 (groups of
32, scales that are exponents of two).

Bytes (R, C / 2) have two numbers, the first in the low half; scales (R, G). W = q * (scale / the scale for all),
rounded to bfloat16, as the library's `dequantize` does."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ..headers import Shape, TensorInfo
from .bits import exponents, to_float
from .rows import Rows, Settings, need

POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; the highest bit is the sign
VALUES = (*POSITIVE, *(-value for value in POSITIVE))


def shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    need(len(main.shape) == 2 and len(sides["scale"].shape) == 2, "tensors that are no matrices")
    rows, columns = main.shape[0], 2 * main.shape[1]
    count, groups = sides["scale"].shape
    need(count == rows and groups > 0 and columns % groups == 0, f"scales ({count}, {groups}) for ({rows}, {columns})")
    need("global" not in sides or prod(sides["global"].shape) == 1, "more than one scale for all")
    return rows, columns


def dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Rows of bytes (n, C / 2) -> bfloat16 (n, C)."""
    numbers = torch.tensor(VALUES)[torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).int()]
    scale = sides["scale"][rows.first : rows.last]
    grid = exponents(scale) if scale.dtype == torch.uint8 else to_float(scale)
    if "global" in sides:
        grid = grid / sides["global"].float().view(1)
    numbers *= grid.repeat_interleave(numbers.shape[1] // grid.shape[1], dim=1)
    return numbers.to(torch.bfloat16)
