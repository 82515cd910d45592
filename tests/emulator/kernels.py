"""In the place of quant/triton_kernels.py and model/triton_rotary.py on emulated devices: what their kernels compute,
each an operator of its own."""

import torch
from torch import Tensor

FEW = 16
torch.library.define("emulated::int8", "(Tensor codes, Tensor scales, Tensor x) -> Tensor")
torch.library.define("emulated::int4", "(Tensor words, Tensor scales, Tensor x, int rows) -> Tensor")
torch.library.define("emulated::rotate", "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")


def check(device: torch.device) -> None:
    """They run everywhere."""


def multiply_int8(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    return torch.ops.emulated.int8(codes, scales, x)  # type: ignore[no-any-return]


def multiply_int4(words: Tensor, scales: Tensor, x: Tensor, rows: int) -> Tensor:
    return torch.ops.emulated.int4(words, scales, x, rows)  # type: ignore[no-any-return]


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.emulated.rotate(queries, keys, cos, sin)  # type: ignore[no-any-return]


@torch.library.impl("emulated::int8", "CPU")
def _int8(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    matrix = codes[:, : x.shape[1]].float() * scales.float()[:, None]
    return (x.float() @ matrix.T).to(x.dtype)


@torch.library.impl("emulated::int4", "CPU")
def _int4(words: Tensor, scales: Tensor, x: Tensor, rows: int) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words[:rows, :, None] >> shifts[:, None]) & 15  # (rows, G, 8, 4): column 4 i + j of a group
    scale, zero = scales[:rows, :, 0].float(), scales[:rows, :, 1].float()
    matrix = (codes.float() - 8) * scale[:, :, None, None] + zero[:, :, None, None]
    return (x.float() @ matrix.reshape(rows, -1)[:, : x.shape[1]].T).to(x.dtype)


@torch.library.impl("emulated::rotate", "CPU")
def _rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As triton_rotary does it: halves apart, rounded after each product and sum."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        (turn, turn_too), (turned, turned_too) = (each[:, None].chunk(2, -1) for each in (cos, sin))
        return torch.cat([first * turn - second * turned, second * turn_too + first * turned_too], -1)

    return rotated(queries), rotated(keys)
