"""Products by our own C++ kernels (src/products.h), which take the processor's integer instructions.

int8: tokens (K,) are rounded to 16 bits with one step each, so the product's error is that of the weights.
int4: tokens are rounded to 8 bits with a step for each 32 columns, which adds half a percent to the weights' 8."""

import ctypes

import torch
from torch import Tensor

from .library import chosen, library, number_of, parallel

ROWS = 16  # of a block of int4
INT8, INT4, WORDS = range(3)  # `Kind` of src/kernels.cpp
WORDS_BY = "avx512_vnni"
FEW_WORDS = 4  # tokens up to which WORDS are quicker than oneDNN (measured on one thread, where oneDNN has AMX)
DTYPES = (torch.bfloat16, torch.float32)  # of tokens and products


class _Work(ctypes.Structure):
    """`Work` of src/numbers.h, whose last six fields are its own."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "item")),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("apart", "tokens")),
        ("out", ctypes.c_void_p),
        ("_own", ctypes.c_int64 * 6),
    ]


def products_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with quantized weights of a model in `dtype` are ours."""
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(chosen())


class Products:
    """A matrix (N, K): int8 codes (N, K) with a scale a row, (N,), in bfloat16 or float32; or int4 codes as
    `rows_to_int4` writes them, with pairs of scale and zero in bfloat16, (blocks of ROWS, groups, ROWS, 2); or
    `words`, the memory of onednn.Codes, with scales (N,) in float32. Words need WORDS_BY."""

    def __init__(self, codes: Tensor, scales: Tensor, rows: int, columns: int, by: str = "") -> None:
        """`by`: the instructions to take, of those that are `chosen` by default."""
        self._matrix = codes.data_ptr(), scales.data_ptr(), rows, columns
        self._alive = codes, scales
        self._rows, self._kind = rows, INT4 if codes.dtype == torch.uint8 else INT8 if codes.dim() == 2 else WORDS
        self._number = number_of(by or chosen())
        self._library, self._parallel = library(), parallel()

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
