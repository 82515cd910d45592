"""int8 products by oneDNN: matrices in its kernel's layout, tokens in 16 bits.

Processors with VNNI multiply unsigned by signed bytes, and sum in int32, as fast as the memory delivers the weights. A
token x (K,) is rounded to 16 bits, x = s (256 h + l); its bytes h and l are two rows of a product. So the weights are
read once, and the sums are exact.

oneDNN's own operator packs only 0.3 GB/s. Its layout is simple, so we write the bytes to their places ourselves, after
comparing once for every shape.
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
COLUMNS = 2**16  # with more, sums could overflow
TOKENS = 64  # at a time
LEVELS, MIDDLE = 32639, 32896  # of 16 bits: both bytes of zero are 128


@cache
def is_fast() -> bool:
    """Whether this processor has VNNI."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def nbytes(rows: int, columns: int) -> int:
    """Bytes of a matrix (rows, columns): its codes, and the sum of each row in int32."""
    return _whole(rows) * (_whole(columns) + 4)


class Codes:
    """Codes (n, K), int8: `memory`, and oneDNN's tensor over it, `opaque`."""

    def __init__(self, memory: Tensor, rows: int, columns: int) -> None:
        """`memory`: nbytes(rows, columns), int8. The shape must be `is_known`."""
        self.memory, self._rows, self._columns = memory, _whole(rows), _whole(columns)
        self.opaque = _opaque(memory, rows, columns)

    @property
    def matrix(self) -> Tensor:
        """All codes, in the kernel's layout."""
        return self.memory[: self._rows * self._columns].view(self._rows, self._columns)

    def write(self, begin: int, codes: Tensor, sums: Tensor) -> None:
        """Writes rows from `begin`, and their `sums` (n,), int32. `begin` and n: multiples of BLOCK, but at the end."""
        words, behind = _words(codes), self.memory[self._rows * self._columns :].view(torch.int32)
        place = self.memory[begin * self._columns :].view(torch.int32)[: words.numel()]
        place.view(words.shape).copy_(words)
        torch.neg(sums, out=behind[begin : begin + len(sums)])


def _words(codes: Tensor) -> Tensor:
    """Codes (n, K) -> the kernel's layout, padded with zeros, in int32 words of four columns: (blocks of 64 rows,
    blocks of 16 words, words, rows)."""
    missing = -codes.shape[1] % BLOCK, -len(codes) % BLOCK
    if any(missing):
        codes = pad(codes, (0, missing[0], 0, missing[1]))
    return codes.view(-1, BLOCK, codes.shape[1] // BLOCK, BLOCK).view(torch.int32).permute(0, 2, 3, 1)


@cache
def _descriptor(rows: int, columns: int) -> Tensor | None:
    """oneDNN's descriptor of codes of this shape, in bytes; None if its layout differs from ours."""
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
    """Whether oneDNN's layout for codes of this shape is ours."""
    known = _torch() is not None and _descriptor(rows, columns) is not None
    trim_heap()  # a trial takes twice the matrix
    return known


@cache
def _torch() -> ctypes.CDLL | None:
    """torch's C library; None if it cannot make oneDNN's tensors."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        needed = library.aoti_torch_create_tensor_from_blob_v2, torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr
        return library if all(needed) else None
    except (OSError, AttributeError):
        return None


def _opaque(memory: Tensor, rows: int, columns: int) -> Tensor:
    """oneDNN's tensor over `memory`, which must outlive it; made as torch's compiled models make their constants."""
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
    """Quantizes tokens (M, K) to 16 bits: low, then high bytes (2 M, K), uint8, and the step (float if M = 1, else
    (M, 1), float32)."""
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
    """`x` from in_bytes, `scales` of the rows (n,), float32 -> (M, n), float32; for one token (n,)."""
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
