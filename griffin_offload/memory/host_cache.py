"""RAM for layers between prompts: what every prompt pass needs of them is read from disk once, then found here."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .arena import Arena, padded

Shape = tuple[int, ...]


class HostTier:
    """Some layers' tensors, as they are read. On the CPU the prompt pass computes with them where they lie."""

    def __init__(self) -> None:
        self._wanted: frozenset[int] = frozenset()
        self._layers: dict[int, dict[str, Tensor]] = {}
        self._read: set[int] = set()

    def hold(self, count: int, total: int) -> None:
        """From here on, `count` of `total` layers: those that were held stay, as far as the count goes."""
        self._wanted = frozenset(spread(total)[:count])
        for layer in self._layers.keys() - self._wanted:
            self._drop(layer)

    def take(
        self, layer: int, shapes: Mapping[str, Shape], dtype: torch.dtype, phases: Mapping[str, int | None]
    ) -> dict[str, Tensor]:
        """A layer's tensors by name: those that are here, or new ones at their files' phases; {} if it is not held."""
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
        """The layer's tensors, if it is held, are filled: the next prompt need not read them."""
        if layer in self._layers:
            self._read.add(layer)

    def _drop(self, layer: int) -> None:
        self._layers.pop(layer, None)
        self._read.discard(layer)


def spread(total: int) -> list[int]:
    """Layers in an order whose every beginning lies evenly among them: while one is computed, the disk reads on."""
    return sorted(range(total), key=lambda layer: f"{layer:016b}"[::-1])
