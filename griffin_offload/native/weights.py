"""GGUF's blocks -> float32, and rows -> int4, by our own C++ kernels. Bit for bit what torch's operators make of them
(checkpoint/gguf/blocks.py, quant/int4.py), at several times the speed."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from .library import chosen, library, number_of, parallel

KINDS = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # in the order of BLOCKS in src/kernels.cpp
SOURCES = (torch.bfloat16, torch.float32)


class _Rows(ctypes.Structure):
    """`Rows` of src/numbers.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("item", "apart", "count", "columns")),
        *((name, ctypes.c_void_p) for name in ("codes", "pairs")),
    ]


def unpacker(kind: str) -> Callable[[Tensor, Tensor], None] | None:
    """What unpacks (blocks (n, bytes), uint8; out (n, elements), in one of SOURCES; both contiguous) the blocks of a
    type, by one thread. None: there is no kernel."""
    by = chosen()
    if kind not in KINDS or not by:
        return None
    unpack, numbers = library().griffin_unpack, (number_of(by), KINDS.index(kind))  # type: ignore[union-attr]
    return lambda blocks, out: unpack(blocks.data_ptr(), len(blocks), *numbers, out.data_ptr(), out.element_size())


def rows_to_int4(rows: Tensor, codes: Tensor, pairs: Tensor, by: str = "") -> None:
    """Rows (n, K), in one of SOURCES -> their codes and pairs of scale and zero, in the layout of `Products`:
    contiguous memory of as many blocks of 16 rows as n takes, the last filled up. `by`: as in `Products`."""
    assert rows.dtype in SOURCES
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    given = _Rows(rows.data_ptr(), rows.element_size(), rows.stride(0), *rows.shape, codes.data_ptr(), pairs.data_ptr())
    library().griffin_to_int4(  # type: ignore[union-attr]
        ctypes.byref(given), number_of(by or chosen()), parallel(), torch.get_num_threads()
    )
