"""Numbers of 8 bits or fewer -> wider ones."""

import torch
from torch import Tensor

WORD = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """Words (..., W), int32 -> unsigned integers (..., W * 32 / bits), uint8; `bits`: 2, 4 or 8."""
    stored = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # a word's lowest byte comes first
    if bits == 8:
        return stored
    return torch.stack([(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1).flatten(-2)


def to_float(numbers: Tensor) -> Tensor:
    """Numbers in float32, as Tensor.float does. torch converts FP8 one by one; float16 has room for its bits, moved."""
    if numbers.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return numbers.float()
    stored = numbers.view(torch.int8)
    if numbers.dtype == torch.float8_e5m2:
        return (stored.to(torch.int16) << 8).view(torch.float16).float()
    if ((stored & 127) == 127).any():  # NaN, which float16 writes otherwise
        return numbers.float()
    wide = stored.to(torch.int16)  # the sign's bit is in all of the upper byte
    moved = (wide & -(2**15)) | ((wide & 127) << 7)
    return moved.view(torch.float16).float() * 256  # whose exponents begin 8 lower


def exponents(stored: Tensor) -> Tensor:
    """Bytes that are exponents of two, 127 added (E8M0) -> float32."""
    return (stored.float() - 127).exp2()


def scaled_by_group(numbers: Tensor, zero: Tensor, scale: Tensor, first: int, size: int) -> Tensor:
    """Columns of a weight from number `first` on, (R, n), less the zero points of their groups (R, G), times the scales
    (R, G): in place, in float32. `size`: columns of a group."""
    last = first + numbers.shape[1]
    for group in range(first // size, -(-last // size)):
        part = numbers[:, max(0, group * size - first) : (group + 1) * size - first]
        part -= zero[:, group, None]
        part *= scale[:, group, None]
    return numbers
