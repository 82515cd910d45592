"""CUDA graphs: what is submitted while one is recorded is only noted down, and a replay does it on the same memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from . import streams, tensor


def graph_pool_handle() -> tuple[int, int]:
    return (0, 1)


@contextmanager
def graph(cuda_graph: "CUDAGraph", pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
    """In the place of torch.cuda.graph."""
    streams.synchronize()
    with streams.stream(stream or streams.Stream()):
        cuda_graph.capture_begin(pool, **options)
        yield
        cuda_graph.capture_end()


class CUDAGraph:
    """In the place of torch.cuda.CUDAGraph. Values that were computed in a recording are gone at its end, and what it
    changed is as it was: only a replay computes."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._work: list[tuple[Any, Any, Any, list[Tensor], list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._fresh: dict[int, Tensor] = {}
        self._refused, self._stream, self._ended = "", None, False
        self._taken = 0

    @property
    def operators(self) -> list[str]:
        """What a replay runs, in order."""
        return [str(func) for func, *_ in self._work]

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._stream = stream = streams.current_stream()
        if stream.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if stream.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        memory = tensor.memories[stream.device.index]
        memory.peak_allocated, self._taken = memory.allocated, memory.allocated
        stream.graph = self

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Notes work down. The result has its shape, and no values that may be used."""
        for given, argument in tensor._with_schema(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for each in tree_iter(given):
                    if isinstance(each, Tensor):
                        self._save(each)
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        taken = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        keys = {tensor._key(each) for each in taken}
        fresh = [each for each in tree_iter(out) if isinstance(each, Tensor) and tensor._key(each) not in keys]
        self._fresh |= {tensor._key(each): each for each in fresh}
        self._work.append((func, args, kwargs, fresh, taken))
        return out

    def _save(self, changed: Tensor) -> None:
        key = tensor._key(changed)
        if key not in self._fresh and key not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(changed.untyped_storage())
            self._before[key] = whole, whole.clone()

    def refuse(self, what: str) -> None:
        """Something that no graph can record: the recording is void."""
        self._refused = what
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def capture_end(self) -> None:
        assert self._stream is not None
        stream, self._ended = self._stream, True
        stream.graph = None
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()
        if self._refused:
            raise RuntimeError(f"CUDA error: operation failed due to a previous error during capture ({self._refused})")
        for each in self._fresh.values():
            each.fill_(float("nan") if each.is_floating_point() else -1 if each.dtype != torch.bool else True)
        memory = tensor.memories[stream.device.index]
        self._taken = max(0, memory.peak_allocated - memory.allocated)
        memory.pools += self._taken
        memory.reserved = max(memory.reserved, memory.allocated + memory.pools)
        memory.peak_reserved = max(memory.peak_reserved, memory.reserved)

    def replay(self) -> None:
        if not self._ended or self._refused:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        stream = streams.current_stream()
        with streams.lock, torch.no_grad():
            for func, args, kwargs, fresh, taken in self._work:
                keys = {tensor._key(each) for each in taken}
                out = func(*args, **kwargs)
                made = [each for each in tree_iter(out) if isinstance(each, Tensor) and tensor._key(each) not in keys]
                for there, each in zip(fresh, made, strict=True):
                    there.copy_(each)
            used = {tensor._key(each) for *_, fresh, taken in self._work for each in (*fresh, *taken)}
            stream.submit("a graph", (), used, None)

    def reset(self) -> None:
        self._give_back()
        self._work.clear()

    def _give_back(self) -> None:
        if self._ended and self._stream is not None:
            tensor.memories[self._stream.device.index].pools -= self._taken
            self._taken = 0

    def __del__(self) -> None:
        self._give_back()
