"""Weights in 8 and 4 bits, the slow way; and a matrix in one of our formats."""

from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.memory.arena import Arena
from griffin_offload.quant.formats import FORMATS, allocate_weight
from griffin_offload.quant.int8 import Int8
from griffin_offload.quant.weight import GROUP, Scratch

ERROR = {"": 0.004, "int8": 0.013, "int4": 0.1}  # of a product with normal weights, in bfloat16


def rounded8(matrix: Tensor) -> Tensor:
    """(N, K), float32: each row to 255 levels about 0."""
    scale = matrix.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (matrix / scale).round() * scale


def rounded4(matrix: Tensor) -> Tensor:
    """(N, K), float32: each GROUP of a row to 16 levels from its least to its largest; a last group has zeros too."""
    rows, columns = matrix.shape
    groups = nn.functional.pad(matrix, (0, -columns % GROUP)).view(rows, -1, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((most - least) / 15).clamp_min(1e-10)
    return (((groups - least) / step).round() * step + least).reshape(rows, -1)[:, :columns]


ROUNDED: dict[str, Any] = {"": lambda matrix: matrix.clone(), "int8": rounded8, "int4": rounded4}


def take(name: str, matrix: Tensor) -> Any:
    """A matrix in a format."""
    rows, columns = matrix.shape
    arena = Arena(FORMATS[name].bytes(rows, columns, matrix.dtype.itemsize))
    weight = allocate_weight(name, arena, rows, columns, matrix.dtype)
    assert arena.used <= arena.size
    weight.fill(lambda begin, end, _: matrix[begin:end], Scratch(columns, matrix.dtype.itemsize, "cpu"))
    return weight


def dequantized(weight: Any, rows: int, columns: int) -> Tensor:
    """A weight that Triton multiplies -> (N, K), float64, on the CPU: each code by itself."""
    codes, scales = (tensor.cpu() for tensor in weight.tensors)
    if isinstance(weight, Int8):
        return codes[:, :columns].double() * scales.double()[:, None]
    words = codes.view(torch.int32).view(len(codes), -1, 4).to(torch.int64)
    out = torch.empty(len(codes), words.shape[1] * GROUP, dtype=torch.float64)
    for column in range(out.shape[1]):
        group, i, j = column // GROUP, column % GROUP // 4, column % 4
        scale, zero = scales[group, :, 0].double(), scales[group, :, 1].double()
        out[:, column] = ((words[:, group, j] >> 4 * i & 15) - 8) * scale + zero
    return out[:rows, :columns]


def assert_product(out: Tensor, x: Tensor, matrix: Tensor) -> None:
    """`out` is x Wᵀ, rounded once to its dtype, but for float32's sums."""
    x, exact = x.cpu().double(), x.cpu().double() @ matrix.T
    noise = 1e-6 * (x.abs() @ matrix.abs().T) + torch.finfo(out.dtype).tiny
    assert ((out.cpu().double() - exact).abs() <= torch.finfo(out.dtype).eps * exact.abs() + 8 * noise).all()
