"""Turns oneDNN off while one token is decoded on a CPU, and gives each forward the threads that fit.

torch gives half-precision products to oneDNN, which is made for many rows: for one, torch's own kernel reads a matrix
1.5 times as fast or more (docs/benchmarks.md). The switch is for the whole process.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.backends import mkldnn

from .threads import Threads


class _Switch:
    """Keeps oneDNN off while any thread's forward wants it off, then as it was before."""

    def __init__(self) -> None:
        self._lock, self._before = threading.RLock(), True
        self._users: set[int] = set()

    def off(self, user: "_User") -> None:
        with self._lock:
            if not self._users:
                self._before = bool(mkldnn.enabled)
            self._users.add(id(user))
            mkldnn.enabled = False  # type: ignore[assignment]

    def back(self, user: "_User") -> None:
        with self._lock:
            if id(user) in self._users:
                self._users.discard(id(user))
                if not self._users:
                    mkldnn.enabled = self._before  # type: ignore[assignment]


_switch = _Switch()


class _User:
    """A forward that wants oneDNN off. Where Ctrl-C comes just as it ends, it ends when it is deleted."""

    def __del__(self) -> None:
        _switch.back(self)


@contextmanager
def own_kernels() -> Iterator[None]:
    """Products by torch's own kernels, which are fast for one row and slow for many."""
    user = _User()
    try:
        _switch.off(user)
        yield
    finally:
        _switch.back(user)


def decode_by_own_kernels(model: Any, layer: Any, threads: Threads) -> None:
    """Makes the model's forwards on a CPU run on as many `threads` as fit, and those of one token after others, as in
    decoding, with `own_kernels`.

    But not while `layer` is streamed: forwards of many tokens may then run in between."""
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        if states is None or states.device.type != "cpu" or hasattr(layer, "_hf_hook"):
            return forward(*args, **kwargs)
        one = states.numel() == 1 and cache and cache.get_seq_length()
        with threads.fitted(states.numel()), own_kernels() if one else nullcontext():
            threads.used[torch.get_num_threads()] += 1
            return forward(*args, **kwargs)

    model.forward = run
