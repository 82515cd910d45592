"""A model's layers, feed-forward blocks and shapes, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NeuronRows:
    """How a block's neurons lie in one of its parameters: along `axis`, counted within one routed expert.

    `halves`: gate and up in one, the neurons of gate before those of up, or the two of a neuron side by side."""

    axis: int
    neurons: int
    halves: bool = False
    interleaved: bool = False

    def index(self, kept_neurons: Tensor) -> Tensor:
        """Indices along the axis: kept_neurons (..., k) -> (..., k) or (..., 2 k)."""
        if not self.halves:
            return kept_neurons
        if self.interleaved:
            return torch.stack([2 * kept_neurons, 2 * kept_neurons + 1], dim=-1).flatten(-2)
        return torch.cat([kept_neurons, kept_neurons + self.neurons], dim=-1)

    def split(self, weight: Tensor) -> list[Tensor]:
        """A weight with the neurons as rows: (..., F, D), or gate's and up's."""
        rows = weight.transpose(-1, -2) if self.axis == 1 else weight
        if not self.halves:
            return [rows]
        if self.interleaved:
            return [rows[..., ::2, :], rows[..., 1::2, :]]
        return [rows[..., : self.neurons, :], rows[..., self.neurons :, :]]


@dataclass(frozen=True)
class Block:
    """A feed-forward block of a layer. `path`: its down module, whose input is z, or the module of routed experts.

    `neurons` F, of each of the `routed` experts (0: a plain block). `rows`: its parameters, named within the layer.
    `size`: the config's name for F; '' where there is none."""

    path: str
    neurons: int
    routed: int
    rows: Mapping[str, NeuronRows]
    down: str
    size: str = ""

    @property
    def statistic_shape(self) -> tuple[int, ...]:
        return (self.routed, self.neurons) if self.routed else (self.neurons,)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: parameter names relative to it. `fixed`: those that have no neurons; `matrices`: those of them
    that can be packed, (rows, columns)."""

    module: nn.Module
    prefix: str
    blocks: tuple[Block, ...]
    fixed: tuple[str, ...]
    matrices: Mapping[str, tuple[int, int]]

    @property
    def neuron_tensors(self) -> tuple[str, ...]:
        return tuple(name for block in self.blocks for name in block.rows)

    @property
    def whole(self) -> tuple[int, ...]:
        """Neurons of each block: `kept` of a layer that is not pruned."""
        return tuple(block.neurons for block in self.blocks)
