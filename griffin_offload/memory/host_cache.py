"""Keeps layers in RAM between prompts, so that the next prompt need not read them from disk."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .arena import Arena, padded

Shape = tuple[int, ...]


class HostTier:
    """The tensors of some layers, as read. On the CPU the prompt pass computes with them in place."""

    def __init__(self) -> None:
        self._wanted: frozenset[int] = frozenset()
        self._layers: dict[int, dict[str, Tensor]] = {}
        self._read: set[int] = set()

    def hold(self, count: int, total: int) -> None:
        """Hold `count` of `total` layers from now on; drops the others."""
        self._wanted = frozenset(spread(total)[:count])
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
            self._layers[layer] = held
        return held

    def is_read(self, layer: int) -> bool:
        return layer in self._read

    def was_read(self, layer: int) -> None:
        """Marks a layer's tensors as filled, if it is held."""
        if layer in self._layers:
            self._read.add(layer)

    def _drop(self, layer: int) -> None:
        self._layers.pop(layer, None)
        self._read.discard(layer)


def spread(total: int) -> list[int]:
    """All layers, ordered so that the first n are spread evenly, for any n: the disk reads on while one is computed."""
    return sorted(range(total), key=lambda layer: f"{layer:016b}"[::-1])
