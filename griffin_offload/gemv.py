"""Products with one token, matrix times vector, at the speed of the memory.

On a CPU torch hands half-precision products to oneDNN, which is made for many rows: for one it reads a matrix at two
thirds of the speed of torch's own kernel, or less (docs/benchmarks.md). oneDNN is a switch of the whole process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.backends import mkldnn


@contextmanager
def own_kernels() -> Iterator[None]:
    """Products by torch's own kernels: right for one row, slow for many."""
    before = mkldnn.enabled
    mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        mkldnn.enabled = before


def decode_by_own_kernels(model: Any) -> None:
    """From here on, a forward of one token after others, as in decoding, runs by `own_kernels`."""
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        if states is None or states.numel() > 1 or states.is_cuda or not cache or not cache.get_seq_length():
            return forward(*args, **kwargs)
        with own_kernels():
            return forward(*args, **kwargs)

    model.forward = run
