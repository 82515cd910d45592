"""GPTQ (Frantar and others 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write it.

The weight lies turned: words (C * bits / 32, R), a word with numbers of neighbouring columns. W[r, c] =
scale[g, r] * (q - zero[g, r]) with g the group of column c. In the older form zero points are packed less 1. The
result is rounded to the dtype of the scales, as there."""

from collections.abc import Mapping

from torch import Tensor

from ..headers import Shape, TensorInfo
from .bits import WORD, scaled_by_group, unpack
from .rows import Rows, Settings, need


def shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    need(len(main.shape) == 2 and len(sides["scale"].shape) == 2, "tensors that are no matrices")
    bits, (words, rows), (groups, wide) = settings["bits"], main.shape, sides["scale"].shape
    columns = words * WORD // bits
    need(wide == rows and groups > 0, f"scales {list(sides['scale'].shape)} for {rows} rows")
    need(sides["zero"].shape == (groups, rows * bits // WORD), "zero points of another shape than the scales")
    if order := sides.get("order"):
        need(order.shape == (columns,), f"{order.shape} groups of {columns} columns")
    else:
        need(columns % groups == 0, f"{groups} groups of {columns} columns")
    return rows, columns


def dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Stored rows of words (n, m) -> (m, n * 32 / bits): columns of the weight, in the dtype of the scales."""
    bits, scale = settings["bits"], sides["scale"]
    zero = (unpack(sides["zero"], bits)[:, rows.left : rows.right].float() + settings.get("zero_offset", 1)).T
    right, first = scale[:, rows.left : rows.right].T.float(), rows.first * WORD // bits
    numbers = unpack(stored.T, bits).float()
    if "order" not in sides:
        size = settings["columns"] // len(scale)
        return scaled_by_group(numbers, zero, right, first, size).to(scale.dtype)
    group = sides["order"].long()[first : first + numbers.shape[1]]
    need(int(group.min()) >= 0 and int(group.max()) < len(scale), "a column of a group that is not there")
    numbers -= zero.contiguous()[:, group]
    numbers *= right.contiguous()[:, group]
    return numbers.to(scale.dtype)
