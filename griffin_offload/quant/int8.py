"""8-bit weights: codes q and one scale s a row, w = q s. Multiplied by our own kernel (native/products.py), by torch's,
by oneDNN's (onednn.py), or by Triton's (triton_kernels.py)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..memory.arena import Arena, padded
from ..native.library import chosen
from ..native.products import FEW_WORDS, WORDS_BY, Products, products_on
from . import onednn
from .kernels import DENSE, ONEDNN, OWN, TORCH, TRITON, triton_on
from .products import multiply_made
from .weight import CHUNK, DerivedCache, RowsOf, Scratch, chunks

FEW = 8  # tokens up to which torch's kernel is faster than dense rows (measured; 12 is even)
KERNEL_COLUMNS = 16  # torch's kernel needs a multiple of it and does not check; Triton's rows are padded to one
_int8: Callable[..., Tensor] = torch.ops.aten._weight_int8pack_mm.default


class Int8:
    """(N, K) in int8, row by row."""

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        device = arena.memory.device
        by_torch = device.type == "cpu" and dtype == torch.bfloat16 and columns % KERNEL_COLUMNS == 0
        self._triton = triton_on(device)
        self._padded = arena.take((rows, _whole(columns) if self._triton else columns), torch.int8)
        self._codes = self._padded[:, :columns]
        self._scales = arena.take((rows,), dtype)
        own = products_on(device, dtype)
        if own:
            self._products = Products(self._codes, self._scales, rows, columns)
        self.kernel = TRITON if self._triton else OWN if own else TORCH if by_torch else DENSE

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        if item == 2 and onednn.is_fast():
            return Int8OneDnn.bytes(rows, columns)
        return padded(rows * _whole(columns)) + padded(rows * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        to_codes, to_scales = self._codes[first:last], self._scales[first:last]
        for begin, end in chunks(len(to_codes), scratch.rows(to_codes.shape[1])):
            to_codes[begin:end], to_scales[begin:end], _ = _in_int8(rows, begin, end, scratch, self._scales.dtype)

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor
        flat = x.reshape(-1, x.shape[-1])
        if self._triton and len(flat) <= self._triton.FEW:
            out = self._triton.multiply_int8(self._padded, self._scales, flat)
        elif self.kernel == OWN:
            out = self._products.multiply(flat)
        elif self.kernel == TORCH and len(flat) <= FEW:
            if not flat.is_contiguous() or flat.data_ptr() % 32:  # the kernel would crash
                flat = flat.clone(memory_format=torch.contiguous_format)
            out = _int8(flat, self._codes, self._scales)
        else:
            # Scaled before the product, which would overflow float16 otherwise.
            codes, scales = self._codes, self._scales[:, None]
            out = multiply_made(flat, len(codes), lambda rows, dtype: codes[rows].to(dtype).mul_(scales[rows]))
        return out.view(*x.shape[:-1], -1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self._padded, self._scales)


class Int8OneDnn:
    """(N, K) in int8 in oneDNN's layout, in pieces of some rows. A few tokens are multiplied by our own kernel."""

    def __init__(self, arena: Arena, rows: int, columns: int) -> None:
        self._scales = arena.take((rows,), torch.float32)
        self._pieces = _pieces(rows, columns)
        self._codes = [
            onednn.Codes(arena.take((onednn.nbytes(end - begin, columns),), torch.int8), end - begin, columns)
            for begin, end in self._pieces
        ]
        scales = [self._scales[begin:end] for begin, end in self._pieces]
        self._weights = list(zip(self._codes, scales, strict=True))
        self._products: list[Products] = []
        if chosen() == WORDS_BY:
            pieces = zip(self._codes, scales, self._pieces, strict=True)
            self._products = [
                Products(piece.memory, scale, end - begin, columns) for piece, scale, (begin, end) in pieces
            ]
        self.kernel = OWN if self._products else ONEDNN

    @staticmethod
    def fits(rows: int, columns: int) -> bool:
        pieces = {end - begin for begin, end in _pieces(rows, columns)}
        return columns <= onednn.COLUMNS and all(onednn.is_known(count, columns) for count in pieces)

    @staticmethod
    def bytes(rows: int, columns: int) -> int:
        pieces = _pieces(rows, columns)
        return sum(padded(onednn.nbytes(end - begin, columns)) for begin, end in pieces) + padded(4 * rows)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        for piece, (start, stop) in zip(self._codes, self._pieces, strict=True):
            here = max(first, start)
            for begin, end in chunks(min(last or stop, stop), begin=here):
                codes, scales, values = _in_int8(rows, begin - first, end - first, scratch)
                self._scales[begin:end] = scales
                # The sums are exact in float32.
                piece.write(begin - start, codes, values.sum(1).to(torch.int32))

    def linear(self, x: Tensor) -> Tensor:
        before = x.shape[:-1]
        if self._products and before.numel() <= FEW_WORDS:
            flat = x.reshape(-1, x.shape[-1])
            outs = [products.multiply(flat) for products in self._products]
            return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).view(*before, -1)
        if before.numel() == 1:  # every microsecond counts
            outs = [onednn.product(*weights, _bytes_of(x)) for weights in self._weights]
            return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(x.dtype).view(*before, -1)
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(flat), len(self._scales))
        for begin, end in chunks(len(flat), onednn.TOKENS):
            tokens = onednn.in_bytes(flat[begin:end])
            for weights, (first, last) in zip(self._weights, self._pieces, strict=True):
                out[begin:end, first:last] = onednn.product(*weights, tokens)
        return out.view(*before, -1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [*(piece.matrix for piece in self._codes), self._scales]


def _in_int8(
    rows: RowsOf, begin: int, end: int, scratch: Scratch, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [begin, end) -> codes (n, K), int8; scales (n,); the codes again in float32."""
    scratch.rewind()
    part = rows(begin, end, scratch)
    values = scratch.take(part.shape, torch.float32).copy_(part)
    # amax and amin are several times as fast as aminmax, or as abs, which also takes memory.
    largest = torch.maximum(values.amax(1), values.amin(1).neg_())
    scales = largest.div_(127).clamp_min_(1e-12).to(dtype)
    values.mul_(scales.float().reciprocal()[:, None]).round_().clamp_(-127, 127)
    return scratch.take(part.shape, torch.int8).copy_(values), scales, values


def _whole(columns: int) -> int:
    return -(-columns // KERNEL_COLUMNS) * KERNEL_COLUMNS


def _pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """(begin, end) rows of each piece for oneDNN."""
    return list(chunks(rows, max(CHUNK, onednn.LARGEST // columns // CHUNK * CHUNK)))


_in_bytes = DerivedCache()


def _bytes_of(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """`onednn.in_bytes` of one token, computed once for all matrices that multiply it in turn."""
    both: tuple[Tensor, Tensor | float] | None = _in_bytes.get(x)
    if both is None:
        both = onednn.in_bytes(x.reshape(1, -1))
        _in_bytes.put(x, both)
    return both
