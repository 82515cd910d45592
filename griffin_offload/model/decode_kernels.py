"""Products with one token, matrix times vector, at the speed of the memory.

On a CPU torch hands half-precision products to oneDNN, which is made for many rows: for one it reads a matrix at two
thirds of the speed of torch's own kernel, or less (docs/benchmarks.md). oneDNN is a switch of the whole process.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.backends import mkldnn


class _Switch:
    """Which forwards, of whatever thread, want it off, and how it was before the first of them."""

    def __init__(self) -> None:
        self._lock, self._before = threading.Lock(), True
        self._users: set[object] = set()

    def off(self, user: object) -> None:
        with self._lock:
            if not self._users:
                self._before = bool(mkldnn.enabled)
            self._users.add(user)
            mkldnn.enabled = False  # type: ignore[assignment]

    def back(self, user: object) -> None:
        with self._lock:
            self._users.discard(user)
            if not self._users:
                mkldnn.enabled = self._before  # type: ignore[assignment]


_switch = _Switch()


@contextmanager
def own_kernels() -> Iterator[None]:
    """Products by torch's own kernels: right for one row, slow for many."""
    user = object()
    try:
        _switch.off(user)
        yield
    finally:
        _switch.back(user)


def decode_by_own_kernels(model: Any, layer: Any) -> None:
    """From here on, a forward of one token after others, as in decoding, runs by `own_kernels`.

    Not while `layer`, one of the model's, is streamed: other forwards, of many tokens, may then run before it ends."""
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        one = states is not None and states.numel() == 1 and not states.is_cuda and not hasattr(layer, "_hf_hook")
        if not one or not cache or not cache.get_seq_length():
            return forward(*args, **kwargs)
        with own_kernels():
            return forward(*args, **kwargs)

    model.forward = run
