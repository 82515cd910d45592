"""int8 products by oneDNN: a matrix in the layout of its kernel, tokens in 16 bits.

Processors with VNNI multiply unsigned bytes by signed ones and sum them in int32 as fast as memory brings the weights.
A token x (K,) is rounded to 16 bits of its largest, x = s (256 h + l), and its bytes h and l are two rows of a product:
the weights are read once, and the sums are exact.

oneDNN's own operator packs 0.3 GB/s. Its layout is simple, so here the bytes are written at their places, into memory
of oneDNN's; whether they are the same is tried once for every shape.
"""

import ctypes
import weakref
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64  # rows and columns
LARGEST = 2**24  # numbers in one piece of memory
COLUMNS = 2**16  # beyond, sums could overflow
TOKENS = 64  # at a time
LEVELS, MIDDLE = 32639, 32896  # of 16 bits: both bytes of 0 are 128


@cache
def is_fast() -> bool:
    """Whether this processor has the instructions."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def nbytes(rows: int, columns: int) -> int:
    """Of the memory of a matrix (rows, columns): its codes, and their sums by row, in int32."""
    return _whole(rows) * (_whole(columns) + 4)


class Codes:
    """A matrix of codes (n, K), int8: as `memory`, and as the tensor `opaque` that oneDNN multiplies by."""

    def __init__(self, opaque: Tensor, rows: int, columns: int) -> None:
        self.opaque = opaque
        self._rows, self._columns = _whole(rows), _whole(columns)
        size, address = torch.ops.mkldnn._nbytes(opaque), torch.ops.mkldnn.data_ptr(opaque)
        self.memory = torch.frombuffer((ctypes.c_int8 * size).from_address(address), dtype=torch.int8)

    @property
    def matrix(self) -> Tensor:
        """All codes, in the kernel's order."""
        return self.memory[: self._rows * self._columns].view(self._rows, self._columns)

    def write(self, begin: int, codes: Tensor, sums: Tensor) -> None:
        """Rows from `begin` on, a multiple of BLOCK, and so many, but for the last. `sums` (n,), int32: theirs."""
        missing = -codes.shape[1] % BLOCK, -len(codes) % BLOCK
        if any(missing):
            codes = pad(codes, (0, missing[0], 0, missing[1]))
        end = begin + len(codes)
        # Words of four columns: blocks of 64 rows, blocks of 16 words, words, rows.
        words = codes.view(-1, BLOCK, self._columns // BLOCK, BLOCK).view(torch.int32).permute(0, 2, 3, 1)
        place = self.memory[begin * self._columns : end * self._columns].view(torch.int32)
        place.view(words.shape).copy_(words)
        behind = self.memory[self._rows * self._columns :].view(torch.int32)
        torch.neg(sums, out=behind[begin : begin + len(sums)])


_living: "weakref.WeakValueDictionary[tuple[int, int], Tensor]" = weakref.WeakValueDictionary()
_first: dict[tuple[int, int], Tensor] = {}  # made by a trial, for whoever takes the first of that shape


@cache
def is_known(rows: int, columns: int) -> bool:
    """Whether oneDNN's layout for codes of this shape is the one that is written here: tried once."""
    some = torch.empty(2**16 + 1, dtype=torch.int8).random_(-127, 128, generator=torch.Generator().manual_seed(0))
    codes = some.repeat(-(-rows * columns // len(some)))[: rows * columns].view(rows, columns)
    packed = Codes(_pack(codes), rows, columns)
    expected = packed.memory.clone()
    if len(expected) != nbytes(rows, columns):
        return False
    packed.memory.zero_()
    for begin in range(0, rows, 4 * BLOCK):
        part = codes[begin : begin + 4 * BLOCK]
        packed.write(begin, part, part.sum(1, dtype=torch.int32))
    same = torch.equal(packed.memory, expected)
    if same:
        _first[rows, columns] = packed.opaque
    return same


def take(rows: int, columns: int) -> Codes:
    """Memory for codes of a shape that is known, of at most LARGEST. What is in it is to be written over."""
    shape = rows, columns
    opaque = _first.pop(shape, None)
    if opaque is None:
        living = _living.get(shape)
        opaque = _pack(torch.zeros(shape, dtype=torch.int8)) if living is None else living.clone()
    _living[shape] = opaque
    return Codes(opaque, rows, columns)


def in_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (M, K) -> their bytes (2 M, K), uint8, the low ones first, and what one step is worth (M, 1), float32."""
    values = x.to(torch.float32, copy=True)
    step = values.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(LEVELS)
    levels = values.div_(step).add_(MIDDLE + 0.5).to(torch.int32)
    return torch.stack([levels, levels >> 8]).to(torch.uint8).view(-1, x.shape[1]), step


def product(codes: Codes, scales: Tensor, x: tuple[Tensor, Tensor], out: Tensor) -> None:
    """`x` of in_bytes, `scales` of the rows (n,), float32 -> `out` (M, n)."""
    both, step = x
    weights = codes.opaque, scales, _zeros(len(scales)), None
    multiply = torch.ops.onednn.qlinear_pointwise.default
    low, high = multiply(both, 1.0, 128, *weights, 1.0, 0, torch.float32, "none", [], "").split(len(step))
    torch.mul(low.add_(high, alpha=256), step, out=out)


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


@cache
def _zeros(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int32)


def _whole(count: int) -> int:
    return -(-count // BLOCK) * BLOCK
