"""MXFP4 experts, as gpt-oss is published (OCP Microscaling Formats 1.0; transformers' convert_moe_packed_tensors).

Blocks (E, R, D / 32, 16) of 32 numbers, two in a byte, the first in the low half; scales (E, R, D / 32) are exponents
of two, 127 added. The weight in the model is (E, D, R): an expert lies turned."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..headers import Shape, TensorInfo
from .fp4 import VALUES
from .rows import Rows, Settings, need

BLOCK = 32


def shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    need(len(main.shape) == 4 and main.shape[3] == BLOCK // 2, f"blocks of the shape {list(main.shape)}")
    need(sides["scale"].shape == main.shape[:3], "scales of another shape than the blocks")
    experts, rows, blocks, _ = main.shape
    return experts, blocks * BLOCK, rows


def dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Stored rows of bytes (n, D / 2) -> float32 (D, n): columns of an expert."""
    values = torch.tensor(VALUES)
    turned = stored.T.contiguous()
    numbers = values[torch.stack([turned & 15, turned >> 4], dim=1).flatten(0, 1).int()]
    scale = sides["scale"].view(-1, sides["scale"].shape[-1])[rows.first : rows.last]
    return torch.ldexp(numbers.view(-1, BLOCK, len(stored)), scale.T.int().unsqueeze(1) - 127).flatten(0, 1)
