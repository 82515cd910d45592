"""Our own C++ kernels on this machine, and the layout that they multiply by."""

import pytest
from torch import Tensor

from griffin_offload.native.library import instructions

HERE = [name for name in instructions() if name]
needs_library = pytest.mark.skipif(not HERE, reason="the library was not compiled")


def pack(codes: Tensor) -> Tensor:
    """Codes (n, K) -> the kernel's layout. A block has 16 rows; in it, for each group of 32 columns, four steps of four
    bytes for every row: byte b of step s has column 4 s + b, and 16 + 4 s + b above it."""
    low, high = codes.view(-1, 16, codes.shape[1] // 32, 2, 4, 4).unbind(3)  # blocks, rows, groups, steps, b
    return (low | high << 4).permute(0, 2, 3, 1, 4).reshape(codes.shape[0], -1).contiguous()
