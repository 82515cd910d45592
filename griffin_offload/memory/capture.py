"""Records a step's kernels once and replays them: a CUDA graph. On other devices the step simply runs again."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

from ..errors import one_line


class Capture:
    """Steps by name, each a function without arguments or result that works on tensors at fixed addresses.

    The first `run` of a name computes it, which warms its kernels up; the second records it, and from then on it is
    replayed. All recordings share one pool of memory, since no two of them run at once.
    `failed`: why steps are not recorded though they could be; ''."""

    def __init__(self, device: str) -> None:
        self._records = device == "cuda"
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, Any] = {}
        self.failed = ""

    @property
    def count(self) -> int:
        """Recordings made."""
        return len(self._graphs)

    def run(self, name: Hashable, step: Callable[[], None]) -> None:
        """Raises what the step raises. A step that cannot be recorded is computed every time."""
        if not self._records or name not in self._warm:
            self._warm.add(name)
            step()
            return
        if name not in self._graphs:
            try:
                self._graphs[name] = self._record(step)
            except RuntimeError as error:  # CUDA's; nothing was computed while it recorded
                self._records, self.failed = False, one_line(error)
                step()
                return
        self._graphs[name].replay()

    def _record(self, step: Callable[[], None]) -> Any:
        """As torch.cuda.graph does, but pinned memory stays for the next prompt, and an error leaves the stream."""
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        torch.cuda.synchronize()  # waits for the tokens before: nothing of theirs may be on its way
        with torch.cuda.stream(_stream()):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may use the device
            try:
                step()
            finally:
                graph.capture_end()
        return graph


@cache
def _stream() -> Any:
    """Where all graphs are recorded: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream()
