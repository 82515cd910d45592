"""The memory of emulated devices, as torch's caching allocator counts it, without holes."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

MIB = 2**20
SMALL, MIDDLE = MIB, 10 * MIB  # bytes up to which an allocation shares a segment of 2 or 20 MiB


@dataclass
class Memory:
    """Bytes of one device. `others`: of other processes; `limit`: the most that this process may take, if there is."""

    total: int = 24 * 1024 * MIB
    others: int = 2 * 1024 * MIB
    context: int = 450 * MIB
    limit: int | None = None
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    started: bool = False
    pools: int = 0  # of recorded graphs
    lock: Any = field(default_factory=threading.RLock)

    @property
    def used(self) -> int:
        return self.others + self.reserved + (self.context if self.started else 0)

    @property
    def free(self) -> int:
        return self.total - self.used

    def take(self, size: int) -> int:
        """Bytes that an allocation of `size` takes. Raises torch.OutOfMemoryError."""
        with self.lock:
            self.started = True
            count = -(-size // 512) * 512
            if count > self.reserved - self.allocated - self.pools:
                self._grow(count)
            self.allocated += count
            self.peak_allocated = max(self.peak_allocated, self.allocated)
            self.peak_reserved = max(self.peak_reserved, self.reserved)
            return count

    def _grow(self, count: int) -> None:
        segment = 2 * MIB if count <= SMALL else 20 * MIB if count < MIDDLE else -(-count // (2 * MIB)) * 2 * MIB
        for _ in range(2):
            most = self.free if self.limit is None else min(self.free, self.limit - self.reserved)
            if segment <= most:
                self.reserved += segment
                return
            self.empty_cache()
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {count / MIB:.2f} MiB.")

    def give(self, count: int) -> None:
        with self.lock:
            self.allocated -= count

    def empty_cache(self) -> None:
        with self.lock:
            self.reserved = self.allocated + self.pools

    def reset_peak(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved


class Storages:
    """Which storages in RAM stand for memory of a device: each is counted once, while any tensor of it is alive."""

    def __init__(self) -> None:
        self._count: dict[int, list[Any]] = {}  # by storage: tensors, bytes, the stream that asked for it, device
        self._lock = threading.RLock()

    def hold(self, tensor: Any, ram: torch.Tensor, memory: Memory, stream: Any, freed: Any) -> None:
        """`tensor` stands for `ram`, on `stream`. freed(storage, stream): called when the last tensor of it goes."""
        storage = ram.untyped_storage()
        key = storage._cdata
        with self._lock:
            held = self._count.get(key)
            if held is None:
                self._count[key] = held = [0, memory.take(storage.nbytes()), stream, memory]
            held[0] += 1
        weakref.finalize(tensor, self._let_go, key, memory, freed).atexit = False

    def resized(self, storage: Any) -> None:
        with self._lock:
            held = self._count[storage._cdata]
            held[3].give(held[1])
            held[1] = held[3].take(storage.nbytes())

    def _let_go(self, key: int, memory: Memory, freed: Any) -> None:
        with self._lock:
            held = self._count[key]
            held[0] -= 1
            if held[0]:
                return
            del self._count[key]
            memory.give(held[1])
        freed(key, held[2])
