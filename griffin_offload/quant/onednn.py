"""int8 products by oneDNN: a matrix in the layout of its kernel, tokens in 16 bits.

Processors with VNNI multiply unsigned bytes by signed ones and sum them in int32 as fast as memory brings the weights.
A token x (K,) is rounded to 16 bits of its largest, x = s (256 h + l), and its bytes h and l are two rows of a product:
the weights are read once, and the sums are exact.

oneDNN's own operator packs 0.3 GB/s. Its layout is simple, so here the bytes are written at their places, in memory of
ours; whether they are the same is tried once for every shape.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..memory.heap import trim_heap

BLOCK = 64  # rows and columns
LARGEST = 2**25  # numbers in one piece of memory
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

    def __init__(self, memory: Tensor, rows: int, columns: int) -> None:
        """`memory`: nbytes(rows, columns), int8. Of a shape that is_known."""
        self.memory, self._rows, self._columns = memory, _whole(rows), _whole(columns)
        self.opaque = _opaque(memory, rows, columns)

    @property
    def matrix(self) -> Tensor:
        """All codes, in the kernel's order."""
        return self.memory[: self._rows * self._columns].view(self._rows, self._columns)

    def write(self, begin: int, codes: Tensor, sums: Tensor) -> None:
        """Rows from `begin` on, a multiple of BLOCK, and so many, but for the last. `sums` (n,), int32: theirs."""
        words, behind = _words(codes), self.memory[self._rows * self._columns :].view(torch.int32)
        place = self.memory[begin * self._columns :].view(torch.int32)[: words.numel()]
        place.view(words.shape).copy_(words)
        torch.neg(sums, out=behind[begin : begin + len(sums)])


def _words(codes: Tensor) -> Tensor:
    """Codes (n, K) in the kernel's order, filled up with zeros: words of four columns, int32 (blocks of 64 rows, blocks
    of 16 words, words, rows)."""
    missing = -codes.shape[1] % BLOCK, -len(codes) % BLOCK
    if any(missing):
        codes = pad(codes, (0, missing[0], 0, missing[1]))
    return codes.view(-1, BLOCK, codes.shape[1] // BLOCK, BLOCK).view(torch.int32).permute(0, 2, 3, 1)


@cache
def _descriptor(rows: int, columns: int) -> Tensor | None:
    """What oneDNN knows of codes of this shape, in bytes; None if it lays them out otherwise than here: tried once."""
    some = torch.empty(2**16 + 1, dtype=torch.int8).random_(-127, 128, generator=torch.Generator().manual_seed(0))
    codes = some.repeat(-(-rows * columns // len(some)))[: rows * columns].view(rows, columns)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    size, address = torch.ops.mkldnn._nbytes(packed), torch.ops.mkldnn.data_ptr(packed)
    if size != nbytes(rows, columns):
        return None
    memory = torch.frombuffer((ctypes.c_int8 * size).from_address(address), dtype=torch.int8)
    theirs, sums = memory.view(torch.int32).split([size // 4 - _whole(rows), _whole(rows)])
    for begin in range(0, rows, 4 * BLOCK):
        part = codes[begin : begin + 4 * BLOCK]
        words = _words(part)
        there = theirs[begin * _whole(columns) // 4 :][: words.numel()].view(words.shape)
        if not torch.equal(there, words) or not torch.equal(sums[begin:][: len(part)], -part.sum(1, dtype=torch.int32)):
            return None
    descriptor: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return descriptor


@cache
def is_known(rows: int, columns: int) -> bool:
    """Whether oneDNN's layout for codes of this shape is the one that is written here."""
    known = _torch() is not None and _descriptor(rows, columns) is not None
    trim_heap()  # a trial takes twice the matrix
    return known


@cache
def _torch() -> ctypes.CDLL | None:
    """torch's own library, which its compiled models call; None where it cannot make tensors of oneDNN's."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        needed = library.aoti_torch_create_tensor_from_blob_v2, torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr
        return library if all(needed) else None
    except (OSError, AttributeError):
        return None


def _opaque(memory: Tensor, rows: int, columns: int) -> Tensor:
    """oneDNN's tensor over `memory`, which must live as long: made as torch's compiled models make their constants."""
    library, descriptor = cast(ctypes.CDLL, _torch()), cast(Tensor, _descriptor(rows, columns))
    made = ctypes.c_void_p()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(memory.data_ptr()),
        ctypes.c_int64(2),
        (ctypes.c_int64 * 2)(columns, rows),
        (ctypes.c_int64 * 2)(rows, 1),
        ctypes.c_int64(0),
        ctypes.c_int32(library.aoti_torch_dtype_int8()),
        ctypes.c_int32(library.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(made),
        ctypes.c_int32(library.aoti_torch_layout__mkldnn()),
        ctypes.c_void_p(descriptor.data_ptr()),
        ctypes.c_int64(descriptor.numel()),
    )
    assert not failed, "torch could make no tensor of oneDNN's"
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    opaque: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(made.value, None, None))
    return opaque


def in_bytes(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """Tokens (M, K) -> their bytes (2 M, K), uint8, the low ones first, and what one step is worth: of one token a
    number, of several (M, 1), float32."""
    step: Tensor | float
    if len(x) == 1:
        least, most = torch.aminmax(x)
        step = max(most.item(), -least.item(), 1e-30) / LEVELS
        levels = torch.add(_middle(), x, alpha=1 / step)
    else:
        values = x.to(torch.float32, copy=True)
        step = values.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(LEVELS)
        levels = values.div_(step).add_(_middle())
    levels = levels.to(torch.int32)
    return torch.cat([levels, levels >> 8]).to(torch.uint8), step


def product(codes: Codes, scales: Tensor, x: tuple[Tensor, Tensor | float]) -> Tensor:
    """`x` of in_bytes, `scales` of the rows (n,), float32 -> (M, n), float32; of one token (n,)."""
    both, step = x
    a_step = step if isinstance(step, float) else 1.0
    weights = codes.opaque, scales, _zeros(len(scales)), None
    multiply = torch.ops.onednn.qlinear_pointwise.default
    parts: Tensor = multiply(both, a_step, 128, *weights, 1.0, 0, torch.float32, "none", [], "")
    if isinstance(step, float):
        return torch.add(parts[0], parts[1], alpha=256)
    low, high = parts.chunk(2)
    return low.add_(high, alpha=256).mul_(step)


@cache
def _middle() -> Tensor:
    return torch.tensor([MIDDLE + 0.5])


@cache
def _zeros(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int32)


def _whole(count: int) -> int:
    return -(-count // BLOCK) * BLOCK
