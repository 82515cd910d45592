"""FP8 with a scale for each block of rows and columns (DeepSeek-V3, section 3.3; transformers' Fp8Dequantize).

R rows, C columns, of blocks of B_r x B_c: W = q * scale[r // B_r, c // B_c]. Without blocks there is one scale. AutoFP8
names the scale `weight_scale`, the others `weight_scale_inv`; both are multiplied with."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ..headers import Shape, TensorInfo
from .bits import exponents, to_float
from .rows import Rows, Settings, block_size, need


def shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    """The weight's shape: that of its numbers (R, C), or of experts (E, R, C)."""
    need(len(main.shape) > 1, "FP8 numbers that are no matrix")
    rows, columns = main.shape[-2:]
    if prod(scales := sides["scale"].shape) > 1:
        need(len(scales) == len(main.shape) and scales[:-2] == main.shape[:-2], "its scales are of another shape")
        for size, count, block in ((rows, scales[-2], "block_rows"), (columns, scales[-1], "block_columns")):
            block_size(size, count, settings.get(block, 0))
        need(len(scales) == 2 or rows % scales[-2] == 0, "blocks that go from one expert to the next")
    return main.shape


def dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Rows of FP8 numbers (n, C) -> float32 (n, C)."""
    scale = _numbers(sides["scale"])
    if scale.numel() == 1:
        return to_float(stored) * scale.view(-1)
    total, columns = settings["rows"], stored.shape[1]
    grid = scale.view(-1, scale.shape[-1])  # of experts one below the other
    down = block_size(total, len(grid), settings.get("block_rows", 0))
    across = block_size(columns, grid.shape[1], settings.get("block_columns", 0))
    picked = grid[torch.arange(rows.first, rows.last) // down]
    return to_float(stored) * picked.repeat_interleave(across, dim=1)[:, :columns]


def _numbers(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of two."""
    return exponents(scale) if scale.dtype == torch.uint8 else scale.float()
