"""Integers of a few bits out of 32-bit words, the first one in the lowest bits."""

import torch
from torch import Tensor

WORD = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """Words (..., W), int32 -> unsigned integers (..., W * 32 / bits), int32; `bits`: 2, 4 or 8."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    parts: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2)
