"""AWQ (Lin and others 2023, arXiv:2306.00978), in AutoAWQ's form `gemm`.

The weight lies turned: words (C, R / 8), a word with numbers of eight neighbouring rows in an order of its own.
W[r, c] = (q - zero[g, r]) * scale[g, r] with g the group of column c, rounded to the dtype of the scales, as there."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..headers import Shape, TensorInfo
from .bits import WORD, scaled_by_group
from .rows import Rows, Settings, need

BITS = 4
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where row i of eight lies in its word


def shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    need(len(main.shape) == 2 and len(sides["scale"].shape) == 2, "tensors that are no matrices")
    (columns, words), (groups, wide) = main.shape, sides["scale"].shape
    need(wide == words * WORD // BITS and groups > 0, f"scales {list(sides['scale'].shape)} for {words} words")
    need(sides["zero"].shape == (groups, words), "zero points of another shape than the scales")
    need(columns % groups == 0, f"{groups} groups of {columns} columns")
    return wide, columns


def dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Stored rows of words (n, m) -> (8 m, n): columns of the weight, in the dtype of the scales."""
    scale, each = sides["scale"], WORD // BITS
    zero = _in_order(sides["zero"][:, rows.left : rows.right])
    right = scale[:, rows.left * each : rows.right * each].T.float()
    size = settings["columns"] // len(scale)
    return scaled_by_group(_in_order(stored), zero, right, rows.first, size).to(scale.dtype)


def _in_order(words: Tensor) -> Tensor:
    """Words (n, m) -> their numbers, turned (8 m, n), in float32."""
    turned = words.T.contiguous().unsqueeze(1)
    shifts = torch.tensor([BITS * place for place in ORDER], dtype=torch.int32).view(-1, 1)
    numbers: Tensor = (turned >> shifts) & (2**BITS - 1)
    return numbers.flatten(0, 1).float()
