"""compressed-tensors, as llm-compressor writes it: W = (q - zero) * scale, with a scale (and a zero point) for each
weight, row, group of columns in a row, or block.

Integers of 4 or 8 bits lie in words along the columns, 2^(bits - 1) added; or int8 and FP8 numbers as they are. The
result is rounded to the dtype of the scales, as the library's `dequantize` does."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ..headers import Shape, TensorInfo
from .bits import WORD, to_float, unpack
from .rows import Rows, Settings, block_size, need


def packed_shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    """The shape of a weight in words (R, C * bits / 32)."""
    need(len(main.shape) == 2, "words that are no matrix")
    rows, words = main.shape
    return _checked((rows, words * WORD // settings["bits"]), sides, settings)


def plain_shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    """The shape of a weight whose numbers lie as they are."""
    need(len(main.shape) == 2, "quantized numbers that are no matrix")
    return _checked(main.shape, sides, settings)


def packed_dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Rows of words (n, W) -> (n, C), in the dtype of the scales."""
    bits = settings["bits"]
    numbers = unpack(stored, bits).float()
    zero = sides.get("zero")
    if zero is not None and zero.dtype == torch.int32:  # packed along the rows; both have 2^(bits - 1) added
        zero = unpack(zero.T, bits).T[: len(sides["scale"])]
    elif zero is None:
        numbers -= 2 ** (bits - 1)
    else:
        zero = zero.float() + 2 ** (bits - 1)
    return _scaled(numbers, sides, zero, rows, settings)


def plain_dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Rows of int8 or FP8 numbers (n, C) -> (n, C), in the dtype of the scales."""
    return _scaled(to_float(stored), sides, sides.get("zero"), rows, settings)


def _scaled(
    numbers: Tensor, sides: Mapping[str, Tensor], zero: Tensor | None, rows: Rows, settings: Settings
) -> Tensor:
    scale, columns = sides["scale"], numbers.shape[1]
    wide = [part for part in (zero, scale) if part is not None]
    for part in wide:
        grid = _of_rows(part.float(), rows, columns, sides.get("order"), settings)
        numbers = numbers * grid if part is scale else numbers - grid
    return numbers.to(scale.dtype)


def _of_rows(grid: Tensor, rows: Rows, columns: int, order: Tensor | None, settings: Settings) -> Tensor:
    """Scales or zero points of some rows, (n, C) or (n, 1) or (1, 1)."""
    if grid.numel() == 1:
        return grid.view(1, 1)
    grid = grid.view(len(grid), -1)
    picked = grid[torch.arange(rows.first, rows.last) // _down(settings["rows"], len(grid), settings)]
    groups = picked.shape[1]
    if groups == 1:
        return picked
    if order is not None and int(order.min()) >= 0:  # the group of each column; -1 where there is no order
        return picked[:, order.long()]
    return picked.repeat_interleave(_across(columns, groups, settings), dim=1)[:, :columns]


def _down(rows: int, count: int, settings: Settings) -> int:
    """Rows that have a scale in common."""
    return block_size(rows, count, settings.get("block_rows", 0))


def _across(columns: int, count: int, settings: Settings) -> int:
    """Columns that have a scale in common."""
    return block_size(columns, count, settings.get("block_columns", 0))


def _checked(shape: Shape, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    for role in ("scale", "zero"):
        grid = sides[role].shape if role in sides else ()
        if prod(grid) != 1 and not (role == "zero" and sides[role].dtype == torch.int32):
            need(len(grid) in (1, 2), "scales that are no matrix")
            _down(shape[0], grid[0], settings)
            _across(shape[1], prod(grid[1:]), settings)
    return shape
