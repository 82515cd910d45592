"""Keeps layers in RAM between prompts, so that the next prompt need not read them from disk."""

import math
import weakref
from collections.abc import Mapping

import psutil
import torch
from torch import Tensor

from ..errors import OptionError
from ..units import GIB, format_bytes, parse_bytes
from .arena import Arena, padded
from .machine import available_memory, container_limit
from .page_locks import Locker, PageLocks

Shape = tuple[int, ...]
OTHERS = 0.15  # share of the RAM that is left to other processes, beside a device with memory of its own
OTHERS_AT_LEAST = 2 * GIB


def spare_memory() -> int:
    """Bytes of RAM that layers may still take: what is free, less what is left to other processes; negative where they
    lack it."""
    total = container_limit() or int(psutil.virtual_memory().total)
    return available_memory() - max(int(OTHERS * total), OTHERS_AT_LEAST)


def room_for_layers(asked: str | int | None, copies: bool) -> int:
    """Bytes of RAM for layers between prompts. By default none on the CPU, whose budget has the weights already, and
    beside another device (`copies`) what is free, less what is left to others.

    Raises OptionError for more than is free."""
    if asked is None:
        return max(0, spare_memory()) if copies else 0
    size = parse_bytes(asked)
    if copies and size > (free := available_memory()):
        raise OptionError(f"--host-memory {format_bytes(size)}: {format_bytes(free)} of RAM is free")
    return size


class HostTier:
    """The tensors of some layers, as read. On the CPU the prompt pass computes with them in place.

    `yields`: layers are held only while other processes have RAM enough (elsewhere they are part of the budget).
    `locker`: page-locks layers that are held, between prompts; None: nothing does."""

    def __init__(self, yields: bool = False, locker: Locker | None = None) -> None:
        self._yields = yields
        self._wanted: frozenset[int] = frozenset()
        self._layers: dict[int, dict[str, Tensor]] = {}
        self._memory: dict[int, Tensor] = {}  # of a layer, whole
        self._read: set[int] = set()
        self._locks = PageLocks(locker) if locker else None
        if self._locks:
            weakref.finalize(self, self._locks.stop)  # also when the process ends
            weakref.finalize(self, self._locks.close).atexit = False  # the system unlocks it then

    @property
    def bytes(self) -> int:
        """RAM that the layers take which have been read."""
        return sum(self._bytes(layer) for layer in self._read)

    @property
    def locked_bytes(self) -> int:
        """RAM of the layers that are page-locked."""
        return self._locks.bytes if self._locks else 0

    def lock(self) -> None:
        """Until the next prompt, page-lock the layers that have been read, in the background."""
        if self._locks:
            read = [(layer, self._memory[layer]) for layer in sorted(self._read)]
            self._locks.begin(read, lambda: spare_memory() >= 0)

    def wait_for_locks(self, seconds: float | None = None) -> None:
        """Returns when the layers are locked, as far as they can be, or after so many seconds."""
        if self._locks:
            self._locks.wait(seconds)

    def settle(self) -> None:
        """A prompt begins: nothing more is locked."""
        if self._locks:
            self._locks.stop()

    def is_locked(self, layer: int) -> bool:
        return bool(self._locks and layer in self._locks)

    def close(self) -> None:
        """Gives all layers up."""
        self.settle()
        for layer in list(self._layers):
            self._drop(layer)

    def hold(self, count: int, total: int) -> None:
        """Hold `count` of `total` layers from now on; drops the others, and more where others lack RAM."""
        self.settle()
        order = spread(total)[:count]
        lacking = -spare_memory() if self._yields and self._read else 0
        while order and lacking > 0:
            layer = order.pop()
            lacking -= self._bytes(layer) if layer in self._read else 0
        self._wanted = frozenset(order)
        for layer in self._layers.keys() - self._wanted:
            self._drop(layer)

    def take(
        self, layer: int, shapes: Mapping[str, Shape], dtype: torch.dtype, phases: Mapping[str, int | None]
    ) -> dict[str, Tensor]:
        """A held layer's tensors by name, allocated at their files' `phases` if they are new; {} for other layers."""
        held = self._layers.get(layer, {})
        if {name: tuple(tensor.shape) for name, tensor in held.items()} != dict(shapes):
            self._drop(layer)
            held = {}
        if not held and layer in self._wanted:
            arena = Arena(sum(padded(math.prod(shape) * dtype.itemsize) for shape in shapes.values()))
            held = {name: arena.take(shape, dtype, phases[name]) for name, shape in shapes.items()}
            self._layers[layer], self._memory[layer] = held, arena.memory
        return held

    def admits(self, layer: int) -> bool:
        """Whether a layer that was taken can be filled now; drops it where there is no RAM to spare. Its memory is not
        in use before it is filled."""
        if layer in self._layers and self._yields and spare_memory() < self._bytes(layer):
            self._drop(layer)
        return layer in self._layers

    def is_read(self, layer: int) -> bool:
        return layer in self._read

    def was_read(self, layer: int) -> None:
        """Marks a layer's tensors as filled, if it is held."""
        if layer in self._layers:
            self._read.add(layer)

    def _bytes(self, layer: int) -> int:
        return sum(tensor.nbytes for tensor in self._layers.get(layer, {}).values())

    def _drop(self, layer: int) -> None:
        if self._locks:
            self._locks.free(layer)
        self._layers.pop(layer, None)
        self._memory.pop(layer, None)
        self._read.discard(layer)


def spread(total: int) -> list[int]:
    """All layers, ordered so that the first n are spread evenly, for any n: the disk reads on while one is computed."""
    return sorted(range(total), key=lambda layer: f"{layer:016b}"[::-1])
