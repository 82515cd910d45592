"""Page-locks RAM that is filled already, so that a GPU copies from it by itself.

Locking takes a while, and the driver may let nothing else run meanwhile. So it is done between prompts, on a thread."""

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .cuda import is_cuda

PORTABLE = 1  # for all GPUs
PAUSE = 0.3  # seconds: a program that ends now, or asks again, need not wait for a layer


class Locker(Protocol):
    def lock(self, memory: Tensor) -> bool:
        """Page-locks memory on the CPU, whole pages from the first byte on. False where that is refused."""

    def unlock(self, memory: Tensor) -> None: ...


class CudaLocker:
    """Asks the CUDA driver, which knows its limits."""

    def lock(self, memory: Tensor) -> bool:
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)) == 0

    def unlock(self, memory: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def locker_for(device: str) -> Locker | None:
    """None where copies to the device do not become quicker."""
    return CudaLocker() if is_cuda(device) else None


class PageLocks:
    """Memory that is locked, by number, and kept until it is unlocked. A thread locks from `begin` on: `stop` it before
    anything is freed."""

    def __init__(self, locker: Locker) -> None:
        self._locker = locker
        self._locked: dict[int, Tensor] = {}
        self._refused = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes for memory in list(self._locked.values()))  # the thread may add one

    def __contains__(self, number: int) -> bool:
        return number in self._locked

    def begin(self, wanted: Iterable[tuple[int, Tensor]], has_room: Callable[[], bool]) -> None:
        """Locks memory in the background, in this order, after a pause, while `has_room()`; none where some was refused
        before."""
        self.stop()
        missing = [(number, memory) for number, memory in wanted if number not in self._locked]
        if missing and not self._refused:
            self._stopping.clear()
            self._thread = threading.Thread(
                target=self._run, args=(missing, has_room), name="griffin-page-locks", daemon=True
            )
            self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when all is locked that can be, or after so many seconds."""
        if self._thread and self._thread is not threading.current_thread():  # which may collect garbage
            self._thread.join(seconds)

    def stop(self) -> None:
        """Locks no more; waits for what is being locked now."""
        self._stopping.set()
        self.wait()
        self._thread = None

    def free(self, number: int) -> None:
        """Unlocks memory, if it is locked, before it goes."""
        if (memory := self._locked.pop(number, None)) is not None:
            self._locker.unlock(memory)

    def close(self) -> None:
        self.stop()
        for number in list(self._locked):
            self.free(number)

    def _run(self, wanted: Iterable[tuple[int, Tensor]], has_room: Callable[[], bool]) -> None:
        if self._stopping.wait(PAUSE):
            return
        for number, memory in wanted:
            if self._stopping.is_set() or not has_room():
                return
            if not self._locker.lock(memory):
                self._refused = True
                return
            self._locked[number] = memory
