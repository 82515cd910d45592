"""Records a step's kernels once and replays them: a CUDA graph. On other devices the step simply runs again."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

from ..errors import one_line

_refused: list[Any] = []  # graphs that CUDA refused: torch still points to them


class Capture:
    """Steps by name, each a function without arguments or result that works on tensors at fixed addresses.

    The first `run` of a name computes it, which warms its kernels up; the second shows whether it waits for the device,
    which no graph can record; the third records it. From then on it is replayed, until another one is recorded.
    `count`: recordings made; `failed`: why steps are not recorded though they could be; ''."""

    def __init__(self, device: str) -> None:
        self._records = device == "cuda" and not _refused
        self._done: dict[Hashable, int] = {}  # how often a step was computed, up to twice
        self._recorded: tuple[Hashable, Any] | None = None
        self.count = 0
        self.failed = "CUDA has refused a recording in this process" if _refused and device == "cuda" else ""

    def replays(self, name: Hashable) -> bool:
        """Whether the next `run` of this name is a replay, which returns before the device has done it."""
        return self._records and self._recorded is not None and self._recorded[0] == name

    def run(self, name: Hashable, step: Callable[[], None]) -> None:
        """Raises what the step raises. A step that cannot be recorded is computed every time."""
        done = self._done.get(name, 0)
        if not self._records or not done:
            step()
            self._done[name] = 1
            return
        try:
            if done == 1:
                with self._without_waiting():
                    step()
                self._done[name] = 2
                return
            if self._recorded is None or self._recorded[0] != name:
                self._recorded = name, self._record(step)
                self.count += 1
        except RuntimeError as error:
            self._records, self.failed = False, one_line(error)
        if not self._records:  # the error is gone, and the memory of the recording that it held
            step()  # from its begin: what it may have done is done over
            return
        assert self._recorded
        self._recorded[1].replay()

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        """Within it, an operation that waits for the device is an error. (A recording that fails is worse: it leaves
        torch's allocator and random numbers in the middle of it.)

        On the stream of the recordings, so that cuBLAS has its workspace for it before: in a recording it would be
        part of the graph's memory, and keep it."""
        before, computing, stream = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream(), _stream()
        stream.wait_stream(computing)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch tells once that this is a prototype
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(stream):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
            computing.wait_stream(stream)

    def _record(self, step: Callable[[], None]) -> Any:
        """As torch.cuda.graph does, but pinned memory stays for the next prompt, and an error leaves the stream."""
        torch.cuda.synchronize()  # waits for the tokens before: then the last recording, and its memory, may go
        self._recorded = None
        torch.cuda.empty_cache()  # a recording takes new memory alone: torch gives none back while it records
        # A pool of its own: torch does not take one whose last graph is gone.
        pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(_stream()):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may use the device
                step()
                graph.capture_end()
            except BaseException:
                _clean_up(graph, pool)
                raise
        return graph


def _clean_up(graph: Any, pool: Any) -> None:
    """After a recording that failed: ends it, and the allocations that torch would go on to make for it. Where CUDA
    refuses even that, nothing is recorded any more in this process, and the random numbers leave the recording: older
    versions of torch would draw no token outside of it."""
    try:
        graph.capture_end()
    except RuntimeError:
        _refused.append(graph)
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        with suppress(RuntimeError, AttributeError, IndexError):
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())  # the same numbers; a copy is in no recording


@cache
def _stream() -> Any:
    """Where all graphs are recorded: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream()
