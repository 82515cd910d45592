"""Rotates the queries and keys of one token by their position, in one Triton kernel in place of ten of torch's.

B sequences, H heads of queries, G of keys, D head size. Rounded as torch's kernels round, after each operation."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """queries (B, H, 1, D), keys (B, G, 1, D), cos and sin (B or 1, 1, D) -> queries and keys, rotated.

    All of one dtype, and with neighbours in their last dimension."""
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (queries, keys)]
    heads, half = (queries.shape[1], keys.shape[1]), queries.shape[3] // 2
    strides = *queries.stride()[:2], *keys.stride()[:2], *(x.stride(0) if len(x) > 1 else 0 for x in (cos, sin))
    sizes = *heads, half, triton.next_power_of_2(half)
    with torch.cuda.device(queries.device) if queries.device.index else nullcontext():
        grid = (len(queries) * sum(heads),)
        # Not fused: torch rounds each product, and the sum of two.
        _rotate[grid](queries, keys, cos, sin, *outs, *strides, *sizes, num_warps=1, enable_fp_fusion=False)
    return outs[0], outs[1]


@triton.jit
def _rotate(
    q, k, cos, sin, q_out, k_out, q_b, q_h, k_b, k_h, cos_b, sin_b, H, G, HALF: tl.constexpr, ROOM: tl.constexpr
):
    head, sequence = tl.program_id(0) % (H + G), tl.program_id(0) // (H + G)
    column = tl.arange(0, ROOM)
    there = column < HALF
    if head < H:
        given, out = q + sequence * q_b + head * q_h, q_out + (sequence * H + head) * 2 * HALF
    else:
        given, out = k + sequence * k_b + (head - H) * k_h, k_out + (sequence * G + head - H) * 2 * HALF
    first, second = tl.load(given + column, there), tl.load(given + HALF + column, there)
    turn, turned = cos + sequence * cos_b + column, sin + sequence * sin_b + column
    # A sum with a negative product is the difference.
    one = _product(first, tl.load(turn, there)) - _product(second, tl.load(turned, there))
    two = _product(second, tl.load(turn + HALF, there)) + _product(first, tl.load(turned + HALF, there))
    tl.store(out + column, one.to(out.dtype.element_ty), there)
    tl.store(out + HALF + column, two.to(out.dtype.element_ty), there)


@triton.jit
def _product(x, y):
    """Rounded to the dtype of both, in float32."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)
