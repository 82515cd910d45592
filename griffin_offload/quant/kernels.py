"""What multiplies a few tokens by a quantized weight, and whether Triton does on a device."""

from functools import cache
from typing import Any

import torch

# A weight's `kernel`. OWN: native/products.py. DENSE: a few rows at a time are made dense.
TRITON, OWN, TORCH, ONEDNN, DENSE = "triton", "own C++ kernel", "torch kernel", "oneDNN", "dense rows"


@cache
def triton_on(device: torch.device) -> Any | None:
    """The module of Triton's kernels; None where they do not run. Compiles two of them (a second) when first asked.

    Triton comes with torch's CUDA packages for Linux. It needs a C compiler, and a GPU that is not too old."""
    if device.type != "cuda":
        return None
    try:
        from . import triton_kernels

        triton_kernels.check(device)
    except Exception:  # of Triton's many kinds
        return None
    return triton_kernels
