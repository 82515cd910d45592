"""4-bit weights: codes q, rounded to nearest; scale s and zero z for GROUP columns of a row, w = (q - 8) s + z."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..memory.arena import Arena, padded
from ..native.products import ROWS, Products, products_on
from ..native.weights import rows_to_int4
from .kernels import DENSE, OWN, TORCH, TRITON, triton_on
from .products import is_chosen, multiply_made
from .weight import GROUP, RowsOf, Scratch, chunks, groups

MANY = 128  # tokens from which dense rows are faster than torch's kernel (measured with AVX2, AVX512 and AMX)
BLOCK = 16  # torch's kernel needs a multiple of so many rows
SAMPLE = 16  # rows of a chunk that tell whether its numbers had 4 bits before
OFF_GRID, FEWEST_STEPS = 0.12, 8  # as in native/src/numbers.h, which says why
ON_GPU = 2**22  # numbers that are compared with a grid at a time on a GPU: each time takes a hundred launches
_int4: Callable[..., Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class Int4:
    """(N, K) in int4, padded with zeros to whole groups and blocks.

    Without a kernel a byte has two codes: a column of the first half of a row, and one of the second half."""

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._rows, self._columns = rows, columns
        device = arena.memory.device
        self._triton = triton_on(device)
        by_torch = device.type == "cpu" and dtype == torch.bfloat16
        own = products_on(device, dtype)
        self.kernel = TRITON if self._triton else OWN if own else TORCH if by_torch else DENSE
        n, g = _whole(rows), groups(columns)
        self._codes = arena.take((n, g * GROUP // 2), torch.uint8)
        if self._triton:
            by_row = arena.take((n, g, 2), dtype)
            self._scales = by_row.transpose(0, 1)
            self._for_triton = self._codes.view(torch.int32).view(n, g, 4), by_row
        elif own:
            self._scales = arena.take((n // ROWS, g, ROWS, 2), dtype)
            self._products = Products(self._codes, self._scales, rows, columns)
        else:
            self._scales = arena.take((g, n, 2), dtype)  # scale, zero

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        k = groups(columns)
        return padded(_whole(rows) * k * GROUP // 2) + padded(k * _whole(rows) * 2 * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        on_grid: bool | None = None
        for begin, end in chunks(last or len(self._codes), scratch.rows(self._columns), first):
            scratch.rewind()
            there = min(end, self._rows) - begin
            part = rows(begin - first, begin - first + there, scratch)
            if self.kernel == OWN:
                rows_to_int4(part, self._codes[begin:end], self._scales[begin // ROWS :])
            else:
                on_grid = self._fill_by_torch(part, begin, end, scratch, on_grid)
                if self._codes.device.type == "cpu":  # elsewhere a look waits, so that the first rows tell for all
                    on_grid = None

    def _fill_by_torch(self, part: Tensor, begin: int, end: int, scratch: Scratch, on_grid: bool | None) -> bool:
        """Returns whether the rows lie on a grid; `on_grid`: so did those before them; None: not known."""
        there, columns = part.shape
        values = scratch.take((end - begin, 2 * self._codes.shape[1]), torch.float32)
        values[there:], values[:, columns:] = 0, 0
        values[:there, :columns] = part
        grouped = values.view(end - begin, -1, GROUP)
        least, most = grouped.amin(2), grouped.amax(2)
        dtype = self._scales.dtype
        if on_grid is None:
            on_grid = lie_on_grid(grouped, least, most)
        steps = grid_steps(grouped, least, most) if on_grid else 15
        scales = (most - least).div_(steps).clamp_min_(1e-10).to(dtype)
        zeros = (least + 8 * scales.float()).to(dtype)
        self._scales[:, begin:end, 0], self._scales[:, begin:end, 1] = scales.t(), zeros.t()
        per = scales.float().reciprocal_()
        offset = zeros.float().mul_(per).neg_().add_(8)
        # addcmul, or a subtraction first, is slower: the operands are broadcast over a group.
        grouped.mul_(per[..., None]).add_(offset[..., None]).round_().clamp_(0, 15)
        codes = scratch.take(values.shape, torch.uint8).copy_(values)
        PACK[self.kernel](codes, self._codes[begin:end])
        return on_grid

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor
        flat = x.reshape(-1, x.shape[-1])
        if self._triton and len(flat) <= self._triton.FEW:
            out = self._triton.multiply_int4(*self._for_triton, flat, self._rows)
            return out.view(*x.shape[:-1], -1)
        if self.kernel == OWN:
            return self._products.multiply(flat).view(*x.shape[:-1], -1)
        if (missing := 2 * self._codes.shape[1] - self._columns) > 0:
            flat = pad(flat, (0, missing))
        if self.kernel == TORCH and not (len(flat) >= MANY and is_chosen(flat) and self._can_be_dense):
            out = _int4(flat.contiguous(), self._codes, GROUP, self._scales)
        else:
            out = multiply_made(flat, len(self._codes), self._dense)
        return out[:, : self._rows].view(*x.shape[:-1], -1)

    def _dense(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """These rows in `dtype`, (n, K)."""
        codes = self._codes[rows]
        low, high = codes & 15, codes >> 4
        if self._triton:
            both = torch.stack([low, high], 1).view(len(codes), 2, -1, 4, 4).permute(0, 2, 4, 1, 3)
        elif self.kernel == TORCH:
            half = _kernel_block() // 2
            both = torch.stack([part.view(-1, 2 * codes.shape[1], half).transpose(1, 2) for part in (low, high)], 1)
        else:
            both = torch.cat([low, high], 1)
        values = both.to(dtype, memory_format=torch.contiguous_format).sub_(8)
        scales, zeros = self._scales[:, rows].permute(2, 1, 0)[..., None]
        return values.view(len(codes), -1, GROUP).mul_(scales).add_(zeros).view(len(codes), -1)

    @property
    def _can_be_dense(self) -> bool:
        """Whether codes in the layout of torch's kernel can be read."""
        return _kernel_block() > 0 and len(self._codes) % _kernel_block() == 0

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self._codes, self._scales)


def lie_on_grid(grouped: Tensor, least: Tensor, most: Tensor) -> bool:
    """Whether numbers had 4 bits before (GGUF's Q4_0, Q4_1, Q4_K; AWQ, GPTQ) and lie on a grid: a few groups tell."""
    few = slice(None, None, -(-len(grouped) // SAMPLE))
    return bool((_steps(grouped[few, :4], least[few, :4], most[few, :4]) == 0).float().mean() <= 0.5)


def grid_steps(grouped: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Groups (n, g, GROUP) and their extremes (n, g) -> steps between the extremes, (n, g), of numbers on a grid.

    Its ends a group need not reach: with the steps of its own grid it loses next to nothing."""
    count = ROWS if grouped.device.type == "cpu" else max(ROWS, ON_GPU // grouped[0].numel())
    pieces = zip(grouped.split(count), least.split(count), most.split(count), strict=True)
    steps = torch.cat([_steps(*piece) for piece in pieces])
    return steps.masked_fill_(steps == 0, 15)


def _steps(grouped: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """The steps of each group's grid, (n, g); 0 where the numbers lie on none. Constant groups: 15."""
    steps, width = least.new_zeros(least.shape), most - least
    for number in range(FEWEST_STEPS, 16):
        level = (grouped - least[..., None]).mul_(torch.full_like(width, number).div_(width)[..., None])
        away = level.sub_(level.round()).abs_().amax(2)
        steps.masked_fill_(away <= OFF_GRID, number)
    return steps.masked_fill_(width == 0, 15)


def _pack_halves(codes: Tensor, out: Tensor) -> None:
    """Codes (n, K), uint8, which are overwritten -> two in a byte, (n, K / 2)."""
    low, high = codes.chunk(2, 1)
    out.copy_(low.bitwise_or_(high.bitwise_left_shift_(4)))


def _pack_words(codes: Tensor, out: Tensor) -> None:
    """... -> Triton's layout: byte b of a group's word j has columns 8 b + j and 8 b + 4 + j."""
    low, high = codes.view(len(codes), -1, 4, 2, 4).unbind(3)  # rows, groups, b, j
    out.view(len(codes), -1, 4, 4).copy_(low.bitwise_or_(high.bitwise_left_shift_(4)).transpose(2, 3))


def _pack_for_torch(codes: Tensor, out: Tensor) -> None:
    """... -> the layout of torch's kernel."""
    block = _kernel_block()
    if block and len(codes) % block == 0:
        _pack_blocks(codes, out, block)
    else:
        out.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))


def _pack_blocks(codes: Tensor, out: Tensor, block: int) -> None:
    half = block // 2
    low, high = codes.view(-1, 2, half, codes.shape[1]).unbind(1)
    low.bitwise_or_(high.bitwise_left_shift_(4))
    out.view(-1, codes.shape[1], half).copy_(low.transpose(1, 2))


@cache
def _kernel_block() -> int:
    """Rows of a block in this processor's layout, where a byte has a row and the row half a block further: 64 (AVX512),
    32 (AVX2), 0 for another layout. `_pack_blocks` takes a seventh of torch's time, and no memory."""
    codes = torch.randint(16, (128, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for block in (64, 32):
        ours = torch.empty_like(expected)
        _pack_blocks(codes.clone(), ours, block)
        if torch.equal(ours, expected):
            return block
    return 0


PACK = {TRITON: _pack_words, TORCH: _pack_for_torch, DENSE: _pack_halves}


def _whole(rows: int) -> int:
    return -(-rows // BLOCK) * BLOCK
