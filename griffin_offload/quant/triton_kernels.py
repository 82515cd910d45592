"""Products of a few tokens with int8 and int4 matrices on a GPU, in Triton.

A program computes some rows of the product for one token, with sums in float32. The programs of the same rows run side
by side, so that the second token finds the codes in the GPU's cache. Nothing here waits for the GPU or depends on an
earlier call: a CUDA graph can record these launches.

(N, K): N rows, K columns. M tokens. A row of an int4 matrix has G groups of 32 columns."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

FEW = 16  # tokens up to which these are used instead of dense rows (estimated, not measured)
ALIGNED = 16  # bytes of a load: rows of codes begin at multiples of it


def multiply_int8(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """x (M, k) times int8 codes (N, K) with scales (N,) -> (M, N), in x's dtype.

    k <= K, a multiple of ALIGNED: x is padded with zeros, and the codes there may be any."""
    rows, columns = codes.shape
    out, count = x.new_empty(len(x), rows), _rows_of_a_program(rows)
    step = min(4096 // count, triton.next_power_of_2(columns))
    grid = (len(x) * triton.cdiv(rows, count),)
    with _on(x.device):
        _int8[grid](codes, scales, _aligned(x, columns), out, len(x), rows, columns, count, step, num_warps=4)
    return out


def multiply_int4(words: Tensor, scales: Tensor, x: Tensor, rows: int) -> Tensor:
    """x (M, k) times the first `rows` of an int4 matrix -> (M, rows), in x's dtype.

    words (N, G, 4), int32: bits 4 i to 4 i + 3 of word j are the code of a group's column 4 i + j. scales (N, G, 2):
    the scale and the zero. k <= 32 G: x is padded with zeros."""
    groups = words.shape[1]
    out, count = x.new_empty(len(x), rows), _rows_of_a_program(rows)
    step = min(128 // count, triton.next_power_of_2(groups))
    grid = (len(x) * triton.cdiv(rows, count),)
    with _on(x.device):
        _int4[grid](words, scales, _aligned(x, 32 * groups), out, len(x), rows, groups, count, step, num_warps=1)
    return out


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is the first unless somebody says so; torch itself on a tensor's."""
    return torch.cuda.device(device) if device.index else nullcontext()


def _aligned(x: Tensor, columns: int) -> Tensor:
    """Tokens (M, k) -> (M, columns), contiguous, and at an address from which several elements are read at a time."""
    if x.shape[1] < columns:
        return pad(x, (0, columns - x.shape[1]))
    return x.contiguous() if x.data_ptr() % ALIGNED == 0 else x.clone(memory_format=torch.contiguous_format)


def check(device: torch.device) -> None:
    """Multiplies small matrices. Raises whatever Triton does where it cannot (an old GPU, no C compiler ...)."""
    x = torch.ones(1, 64, dtype=torch.float16, device=device)
    codes, ones = torch.ones(2, 64, dtype=torch.int8, device=device), torch.ones(2, 2, 2, dtype=x.dtype, device=device)
    words = torch.full((2, 2, 4), 0x11111111, dtype=torch.int32, device=device)
    products = [multiply_int8(codes, ones[:, 0, 0], x), multiply_int4(words, ones, x, 2)]
    expected = [[[64.0, 64.0]], [[(1 - 8 + 1) * 64.0] * 2]]
    if [product.tolist() for product in products] != expected:
        raise ArithmeticError(f"Triton's products are wrong on {device}")


def _rows_of_a_program(rows: int) -> int:
    """4 was measured for 13824 rows (docs/benchmarks.md). Where there are few rows, a program takes longer pieces of
    fewer rows, so that as many bytes are on their way."""
    return 4 if rows >= 4096 else 2 if rows >= 2048 else 1


@triton.jit(do_not_specialize=["tokens"])
def _int8(codes, scales, x, out, tokens, N, K, ROWS: tl.constexpr, STEP: tl.constexpr):
    program = tl.program_id(0)
    # Offsets of 64 bits: an lm_head may have more than 2**31 codes.
    token, first = (program % tokens).to(tl.int64), (program // tokens).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    there = first + row < N
    sums = tl.zeros([ROWS, STEP], tl.float32)
    for begin in range(0, K, STEP):
        column = begin + tl.arange(0, STEP)
        mask = there[:, None] & (column < K)[None]
        code = tl.load(codes + first * K + row[:, None] * K + column[None], mask=mask, other=0)
        state = tl.load(x + token * K + column, mask=column < K, other=0.0)
        sums += code.to(tl.float32) * state.to(tl.float32)[None]
    scale = tl.load(scales + first + row, mask=there, other=0.0)
    product = tl.sum(sums, 1) * scale.to(tl.float32)
    tl.store(out + token * N + first + row, product.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _int4(words, scales, x, out, tokens, N, G, ROWS: tl.constexpr, STEP: tl.constexpr):
    program = tl.program_id(0)
    token, first = (program % tokens).to(tl.int64), (program // tokens).to(tl.int64) * ROWS
    row, there = tl.arange(0, ROWS), first + tl.arange(0, ROWS) < N
    sums = tl.zeros([ROWS, STEP], tl.float32)
    for begin in range(0, G, STEP):  # a thread has all four words of a group, of each row
        word, group = begin * 4 + tl.arange(0, STEP * 4), begin + tl.arange(0, STEP)
        mask = there[:, None] & (word < G * 4)[None]
        codes = tl.load(words + first * G * 4 + row[:, None] * (G * 4) + word[None], mask=mask, other=0)
        place, mask = first * G * 2 + (row[:, None] * G + group[None]) * 2, there[:, None] & (group < G)[None]
        scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(scales + place + 1, mask=mask, other=0.0).to(tl.float32)
        products, total = tl.zeros([ROWS, STEP * 4], tl.float32), tl.zeros([STEP * 4], tl.float32)
        for i in tl.static_range(8):
            column = word // 4 * 32 + 4 * i + word % 4
            state = tl.load(x + token * (G * 32) + column, mask=word < G * 4, other=0.0).to(tl.float32)
            # A code q as the first bits of a mantissa, 1 + q / 16: GPUs convert integers at a quarter of their speed.
            bits = codes << (19 - 4 * i) if i < 5 else codes >> (4 * i - 19)
            products += ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True) * state[None]
            total += state
        product, total = tl.sum(products.reshape(ROWS, STEP, 4), 2), tl.sum(total.reshape(STEP, 4), 1)
        # (q - 8) s + z = 16 s (1 + q / 16) + (z - 24 s)
        sums += 16 * scale * product + (zero - 24 * scale) * total[None]
    tl.store(out + token * N + first + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=there)
