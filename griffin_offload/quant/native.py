"""Products by our own C++ kernels (native/products.cpp), which take the processor's integer instructions.

int8: tokens (K,) are rounded to 16 bits with one step each, so the product's error is that of the weights.
int4: tokens are rounded to 8 bits with a step for each 32 columns, which adds half a percent to the weights' 8.

The library is compiled when the package is installed; where no compiler was there, other kernels do its work.
GRIFFIN_CPU names other instructions than the best that the processor has, or `none`."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROWS, GROUP = 16, 32  # of int4: rows of a block, columns with a scale
INT8, INT4, WORDS = range(3)  # `Kind` of products.cpp
WORDS_BY = "avx512_vnni"
FEW_WORDS = 4  # tokens up to which WORDS are quicker than oneDNN (measured on one thread, where oneDNN has AMX)
DTYPES = (torch.bfloat16, torch.float32)  # of tokens and products


class _Work(ctypes.Structure):
    """`Work` of products.cpp, whose last six fields are its own."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "item")),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("apart", "tokens")),
        ("out", ctypes.c_void_p),
        ("_own", ctypes.c_int64 * 6),
    ]


@cache
def instructions() -> Sequence[str]:
    """The sets of instructions that this processor has kernels for, the best first; none without the library."""
    library = _library()
    if library is None:
        return ()
    names, number = [], 0
    while (name := library.griffin_instructions(number)) is not None:
        names.append(name.decode())
        number += 1
    return names


def chosen() -> str:
    """The instructions that products take; '' if there is no library, or none that is quicker than torch.

    Torch takes no AVX512 where ATEN_CPU_CAPABILITY says so; nor do we."""
    names = [name for name in instructions() if name]
    asked = os.environ.get("GRIFFIN_CPU", "")
    if not asked and torch.backends.cpu.get_cpu_capability() == "AVX2":
        names = [name for name in names if not name.startswith("avx512")]
    if asked:
        return asked if asked in names else ""
    return names[0] if names and names[0] != "plain" else ""


def products_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with quantized weights of a model in `dtype` are ours."""
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(chosen())


class Products:
    """A matrix (N, K): int8 codes (N, K) with a scale a row, (N,), in bfloat16 or float32; or int4 codes as `pack_int4`
    writes them, with pairs of scale and zero in bfloat16, (blocks of ROWS, groups, ROWS, 2); or `words`, the memory of
    onednn.Codes, with scales (N,) in float32. Words need WORDS_BY."""

    def __init__(self, codes: Tensor, scales: Tensor, rows: int, columns: int, by: str = "") -> None:
        """`by`: the instructions to take, of those that are `chosen` by default."""
        self._matrix = codes.data_ptr(), scales.data_ptr(), rows, columns
        self._alive = codes, scales
        self._rows, self._kind = rows, INT4 if codes.dtype == torch.uint8 else INT8 if codes.dim() == 2 else WORDS
        self._number = list(instructions()).index(by or chosen())
        self._library, self._parallel = _library(), _parallel()

    def multiply(self, x: Tensor) -> Tensor:
        """x (M, K), in one of DTYPES (int8: that of the scales) -> (M, N), in x's dtype."""
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(len(x), self._rows)
        work = _Work(*self._matrix, x.element_size(), x.data_ptr(), x.stride(0), len(x), out.data_ptr())
        threads = torch.get_num_threads()
        failed = self._library.griffin_product(  # type: ignore[union-attr]
            ctypes.byref(work), self._number, self._kind, self._parallel, threads
        )
        if failed:
            raise MemoryError("no memory for the tokens of a product")
        return out


def pack_int4(codes: Tensor, out: Tensor) -> None:
    """Codes (n, K), uint8, which are overwritten -> the kernel's layout, n K / 2 bytes. n: a multiple of ROWS; K: of
    GROUP.

    A block has ROWS rows; in it, for each group, four steps of four bytes for every row: byte b of step s has column
    4 s + b, and 16 + 4 s + b above it."""
    low, high = codes.view(-1, ROWS, codes.shape[1] // GROUP, 2, GROUP // 2).unbind(3)
    words = low.bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int32)  # blocks, rows, groups, steps
    out.view(torch.int32).view(len(words), -1, 4, ROWS).copy_(words.permute(0, 2, 3, 1))


@cache
def _library() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_products*")):
        try:
            library = ctypes.CDLL(str(path))
            library.griffin_instructions.restype = ctypes.c_char_p
            library.griffin_product.argtypes = [
                ctypes.c_void_p,
                ctypes.c_int,
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_uint,
            ]
        except (OSError, AttributeError):  # of another platform, or of another version
            continue
        return library
    return None


@cache
def _parallel() -> int | None:
    """The address of the function that runs torch's own threads: a second pool would fight with them for the cores.
    None: products take one thread."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
