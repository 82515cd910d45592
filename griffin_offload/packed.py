"""Weights in 8 or 4 bits, and their products with a few tokens by torch's kernels, in int8 by oneDNN's (vnni.py).

int8: a scale for each row (output), w = q s. int4: asymmetric, a scale and a zero for each GROUP of a row,
w = (q - 8) s + z, round to nearest. On a CPU in bfloat16 the kernels read a matrix at the memory's bandwidth;
elsewhere, and for many tokens in int8 without oneDNN, rows are made dense a few at a time and multiplied as always.

N rows (outputs), K columns (inputs), M tokens.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from . import vnni
from .weights.arena import Arena, padded

GROUP = 32
LEAST = 16  # rows and columns of a matrix that is worth packing
BLOCK = 16  # int4: the kernel wants so many rows, or a multiple
CHUNK = 256  # rows quantised or made dense at a time: they stay in the processor's cache
FEW = 8  # tokens up to which int8's kernel is quicker than dense rows (measured; 12 is even)
KERNEL_COLUMNS = 16  # int8's kernel wants a multiple of it, unchecked

_int8: Callable[..., Tensor] = torch.ops.aten._weight_int8pack_mm.default
_int4: Callable[..., Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class Scratch:
    """What CHUNK rows of a matrix pass through on their way into packed weights: taken at the first use, and then used
    again, so that packing leaves no holes in the heap."""

    def __init__(self, columns: int, item: int, device: str) -> None:
        """`columns`: of the widest matrix; `item`: bytes of its elements."""
        self._size, self._device = self.bytes(columns, item), device
        self._arena: Arena | None = None

    @staticmethod
    def bytes(columns: int, item: int) -> int:
        """Rows as they are gathered, in float32, and as codes."""
        return sum(padded(CHUNK * _groups(columns) * GROUP * size) for size in (item, 4, 1))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._arena is None:
            self._arena = Arena(self._size, self._device)
        return self._arena.take(shape, dtype)

    def rewind(self) -> None:
        """For the next rows: what was taken for the last must no longer be used."""
        if self._arena:
            self._arena.rewind()

    def free(self) -> None:
        self._arena = None


# Rows begin to end of a dense matrix: (end - begin, K), of the scratch if they lie nowhere yet.
RowsOf = Callable[[int, int, Scratch], Tensor]


class Weight(Protocol):
    """A matrix (N, K) that knows its product."""

    def linear(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in x's dtype."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What a token reads of it."""


class Stored(Weight, Protocol):
    """One that is in one piece."""

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        """Take the values of the rows from `first` to `last`, or all, a few at a time: `rows` counts from `first`."""


class Dense:
    """A matrix in the model's own dtype."""

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.weight = arena.take((rows, columns), dtype)

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        return padded(rows * columns * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        weight = self.weight[first:last]
        for begin, end in _chunks(len(weight)):
            scratch.rewind()
            weight[begin:end] = rows(begin, end, scratch)

    def linear(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self.weight,)


class Int8:
    """(N, K) in int8, a scale a row."""

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._codes = arena.take((rows, columns), torch.int8)
        self._scales = arena.take((rows,), dtype)
        self._kernel = arena.memory.device.type == "cpu" and dtype == torch.bfloat16 and columns % KERNEL_COLUMNS == 0

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        if item == 2 and vnni.is_fast():
            return Int8Vnni.bytes(rows, columns)
        return padded(rows * columns) + padded(rows * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        to_codes, to_scales = self._codes[first:last], self._scales[first:last]
        for begin, end in _chunks(len(to_codes)):
            to_codes[begin:end], to_scales[begin:end], _ = _in_int8(rows, begin, end, scratch, self._scales.dtype)

    def linear(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self._kernel and len(flat) <= FEW:
            if not flat.is_contiguous() or flat.data_ptr() % 32:  # the kernel would crash
                flat = flat.clone(memory_format=torch.contiguous_format)
            out = _int8(flat, self._codes, self._scales)
        else:
            out = flat.new_empty(len(flat), len(self._codes))
            for begin, end in _chunks(len(self._codes), 4 * CHUNK):
                # Scaled before the product: the codes' own would be beyond float16.
                rows = self._codes[begin:end].to(x.dtype).mul_(self._scales[begin:end, None])
                out[:, begin:end] = linear(flat, rows)
        return out.view(*x.shape[:-1], -1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self._codes, self._scales)


class Int8Vnni:
    """As Int8, its products by oneDNN: see vnni.py. In pieces of some rows."""

    def __init__(self, arena: Arena, rows: int, columns: int) -> None:
        self._scales = arena.take((rows,), torch.float32)
        self._pieces = _pieces(rows, columns)
        self._codes = [
            vnni.Codes(arena.take((vnni.nbytes(end - begin, columns),), torch.int8), end - begin, columns)
            for begin, end in self._pieces
        ]
        scales = [self._scales[begin:end] for begin, end in self._pieces]
        self._weights = list(zip(self._codes, scales, strict=True))

    @staticmethod
    def fits(rows: int, columns: int) -> bool:
        pieces = {end - begin for begin, end in _pieces(rows, columns)}
        return columns <= vnni.COLUMNS and all(vnni.is_known(count, columns) for count in pieces)

    @staticmethod
    def bytes(rows: int, columns: int) -> int:
        pieces = _pieces(rows, columns)
        return sum(padded(vnni.nbytes(end - begin, columns)) for begin, end in pieces) + padded(4 * rows)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        for piece, (start, stop) in zip(self._codes, self._pieces, strict=True):
            here = max(first, start)
            for begin, end in _chunks(min(last or stop, stop), begin=here):
                codes, scales, values = _in_int8(rows, begin - first, end - first, scratch)
                self._scales[begin:end] = scales
                # In float32 the sums are exact, and nothing is copied.
                piece.write(begin - start, codes, values.sum(1).to(torch.int32))

    def linear(self, x: Tensor) -> Tensor:
        before = x.shape[:-1]
        if before.numel() == 1:  # every microsecond counts
            outs = [vnni.product(*weights, _bytes_of(x)) for weights in self._weights]
            return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(x.dtype).view(*before, -1)
        flat = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(flat), len(self._scales))
        for begin, end in _chunks(len(flat), vnni.TOKENS):
            tokens = vnni.in_bytes(flat[begin:end])
            for weights, (first, last) in zip(self._weights, self._pieces, strict=True):
                out[begin:end, first:last] = vnni.product(*weights, tokens)
        return out.view(*before, -1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [*(piece.matrix for piece in self._codes), self._scales]


class Int4:
    """(N, K) in int4, a scale and a zero for each GROUP columns of a row; filled up with zeros to whole groups.

    Where there is no kernel, two codes a byte: a column of the first half of a row and one of the second."""

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._rows, self._columns = rows, columns
        self._kernel = arena.memory.device.type == "cpu" and dtype == torch.bfloat16
        n, k = _whole(rows), _groups(columns) * GROUP
        self._codes = arena.take((n, k // 2), torch.uint8)
        self._scales = arena.take((k // GROUP, n, 2), dtype)  # scale, zero

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        groups = _groups(columns)
        return padded(_whole(rows) * groups * GROUP // 2) + padded(groups * _whole(rows) * 2 * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        k = 2 * self._codes.shape[1]
        for begin, end in _chunks(last or len(self._codes), begin=first):
            scratch.rewind()
            values = scratch.take((end - begin, k), torch.float32)
            there = min(end, self._rows) - begin
            values[there:], values[:, self._columns :] = 0, 0
            values[:there, : self._columns] = rows(begin - first, begin - first + there, scratch)
            grouped = values.view(end - begin, -1, GROUP)
            least, most = grouped.amin(2), grouped.amax(2)
            dtype = self._scales.dtype
            scales = (most - least).div_(15).clamp_min_(1e-10).to(dtype)
            zeros = (least + 8 * scales.float()).to(dtype)
            self._scales[:, begin:end, 0], self._scales[:, begin:end, 1] = scales.t(), zeros.t()
            per = scales.float().reciprocal_()
            offset = zeros.float().mul_(per).neg_().add_(8)
            # Not one addcmul, nor a subtraction first: slower with rows that are spread over a group.
            grouped.mul_(per[..., None]).add_(offset[..., None]).round_().clamp_(0, 15)
            codes = scratch.take(values.shape, torch.uint8).copy_(values)
            if self._kernel:
                _pack(codes, self._codes[begin:end])
            else:
                low, high = codes.chunk(2, 1)
                self._codes[begin:end] = low.bitwise_or_(high.bitwise_left_shift_(4))

    def linear(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if (missing := 2 * self._codes.shape[1] - self._columns) > 0:
            flat = pad(flat, (0, missing))
        if self._kernel:
            out = _int4(flat.contiguous(), self._codes, GROUP, self._scales)
        else:
            out = flat.new_empty(len(flat), len(self._codes))
            for begin, end in _chunks(len(self._codes), 4 * CHUNK):
                out[:, begin:end] = linear(flat, self._dense(begin, end))
        return out[:, : self._rows].view(*x.shape[:-1], -1)

    def _dense(self, begin: int, end: int) -> Tensor:
        codes = self._codes[begin:end]
        values = torch.cat([codes & 15, codes >> 4], 1).to(self._scales.dtype).sub_(8)
        scales, zeros = self._scales[:, begin:end].permute(2, 1, 0)[..., None]
        return values.view(end - begin, -1, GROUP).mul_(scales).add_(zeros).view(end - begin, -1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self._codes, self._scales)


FORMATS: dict[str, Any] = {"": Dense, "int8": Int8, "int4": Int4}


def take_weight(format: str, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> Stored:
    """Memory for a matrix (rows, columns) of a model in `dtype`, in one of FORMATS."""
    here = arena.memory.device.type == "cpu" and dtype == torch.bfloat16 and vnni.is_fast()
    if format == "int8" and here and Int8Vnni.fits(rows, columns):
        return Int8Vnni(arena, rows, columns)
    weight: Stored = FORMATS[format](arena, rows, columns, dtype)
    return weight


def _in_int8(
    rows: RowsOf, begin: int, end: int, scratch: Scratch, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, K), int8, scales (n,), and the codes in float32, of some rows."""
    scratch.rewind()
    part = rows(begin, end, scratch)
    values = scratch.take(part.shape, torch.float32).copy_(part)
    # amax and amin: several times as fast as abs, which needs memory of its own, and as aminmax.
    largest = torch.maximum(values.amax(1), values.amin(1).neg_())
    scales = largest.div_(127).clamp_min_(1e-12).to(dtype)
    values.mul_(scales.float().reciprocal()[:, None]).round_().clamp_(-127, 127)
    return scratch.take(part.shape, torch.int8).copy_(values), scales, values


def _pack(codes: Tensor, out: Tensor) -> None:
    """Codes (n, K), uint8, which it uses up, as the kernel wants them: (n, K / 2)."""
    if len(codes) % 64 == 0 and _blocks_of_64():
        _pack_blocks_of_64(codes, out)
    else:
        out.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))


def _pack_blocks_of_64(codes: Tensor, out: Tensor) -> None:
    low, high = codes.view(-1, 2, 32, codes.shape[1]).unbind(1)
    low.bitwise_or_(high.bitwise_left_shift_(4))
    out.view(-1, codes.shape[1], 32).copy_(low.transpose(1, 2))


@cache
def _blocks_of_64() -> bool:
    """Whether this processor's kernel wants rows 32 apart side by side: packing so takes a seventh of torch's time."""
    codes = torch.randint(16, (128, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    ours = torch.empty_like(theirs)
    _pack_blocks_of_64(codes, ours)
    return torch.equal(ours, theirs)


def _whole(rows: int) -> int:
    return -(-rows // BLOCK) * BLOCK


def _groups(columns: int) -> int:
    return -(-columns // GROUP)


def _pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """Begin and end of the rows of each piece that oneDNN holds."""
    return list(_chunks(rows, max(CHUNK, vnni.LARGEST // columns // CHUNK * CHUNK)))


class Made:
    """What was made of a tensor, as long as it lives unchanged."""

    def __init__(self) -> None:
        self._last: tuple[Any, int, Any] | None = None

    def get(self, x: Tensor) -> Any:
        last = self._last
        return last[2] if last and last[0]() is x and last[1] == x._version else None

    def put(self, x: Tensor, made: Any) -> None:
        self._last = None if x.is_inference() else (weakref.ref(x), x._version, made)

    def forget(self) -> None:
        self._last = None


_in_bytes = Made()


def _bytes_of(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """vnni.in_bytes of one token; of one that several matrices multiply in turn, once."""
    both: tuple[Tensor, Tensor | float] | None = _in_bytes.get(x)
    if both is None:
        both = vnni.in_bytes(x.reshape(1, -1))
        _in_bytes.put(x, both)
    return both


def _chunks(end: int, size: int = CHUNK, begin: int = 0) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, size):
        yield start, min(start + size, end)


def linear_module(parent: nn.Module, name: str) -> Any | None:
    """The module whose weight `name` is, if all that it does is to multiply by it: torch's Linear, GPT-2's Conv1D."""
    path, _, attribute = name.rpartition(".")
    module = parent.get_submodule(path)
    return module if attribute == "weight" and type(module) in (nn.Linear, Conv1D) else None


def dense_matrix(module: Any, weight: Tensor) -> Tensor:
    """A linear module's weight as (N, K): Conv1D's lies the other way round."""
    return weight.t() if isinstance(module, Conv1D) else weight
