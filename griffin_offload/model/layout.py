"""A model's layers, feed-forward blocks, shapes and places on disk, as data: nothing here computes or changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.headers import Piece, TensorInfo
from ..memory.arena import PAGE
from .attention_sizes import AttentionSizes

Shape = tuple[int, ...]


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
    def statistic_shape(self) -> Shape:
        return (self.routed, self.neurons) if self.routed else (self.neurons,)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its `prefix` and, relative to it, its parameters.

    `fixed`: the parameters that have no neurons; `matrices`: those of them that can be quantized, (rows, columns)."""

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


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """What planning, pruning, export and the passes know of a model.

    `shapes`: of every parameter by its full name; `buffers`: shape and dtype of those that a checkpoint holds.
    `aliases`: tied parameter -> the one it shares memory with. `pieces`: parameter -> the tensors on disk that fill it;
    empty before a checkpoint is bound. `embedding`, `lm_head`: names of their weights.
    `embedding_on_disk`: the embedding stays in its file, and only the rows of the tokens are read. `lm_head_alone`: the
    lm_head can be quantized, since its embedding can be left on disk.
    `in_chunks`: attention takes a long prompt a chunk at a time; `writes_scores`: it holds a score for every pair of
    tokens. `attention`: sizes of keys and queries. `state_bytes`: of a sequence's recurrent states; None: not known."""

    config: Any
    dtype: torch.dtype
    layers: tuple[Layer, ...]
    shapes: Mapping[str, Shape]
    buffers: Mapping[str, tuple[Shape, torch.dtype]]
    aliases: Mapping[str, str]
    embedding: str
    lm_head: str
    in_chunks: bool
    writes_scores: bool
    attention: AttentionSizes
    state_bytes: int | None = 0
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)
    embedding_on_disk: bool = False
    lm_head_alone: bool = False

    @property
    def table(self) -> str | None:
        """The embedding's name where it stays on disk."""
        return self.embedding if self.embedding_on_disk else None

    @property
    def quantizable_head(self) -> str | None:
        """The lm_head's name where it can be quantized."""
        return self.lm_head if self.lm_head_alone else None

    @cached_property
    def inside(self) -> list[str]:
        """Parameters of the decoder layers."""
        return [layer.prefix + name for layer in self.layers for name in (*layer.fixed, *layer.neuron_tensors)]

    @cached_property
    def outer(self) -> list[str]:
        """Parameters outside the decoder layers that have memory of their own."""
        inside = set(self.inside)
        return [name for name in self.shapes if name not in self.aliases and name not in inside]

    @property
    def converts(self) -> bool:
        """Whether weights have another dtype or form on disk."""
        return any(info.encoding or info.dtype != self.dtype for info in self.infos)

    @property
    def infos(self) -> list[TensorInfo]:
        """The tensors on disk that are read."""
        return [piece.info for parts in self.pieces.values() for piece in parts]

    @property
    def block_layers(self) -> list[int]:
        """The layers that have a feed-forward block: block number -> layer."""
        return [index for index, layer in enumerate(self.layers) if layer.blocks]

    def source(self, name: str) -> Sequence[Piece]:
        """The tensors on disk of a parameter, or of the one it is tied to."""
        return self.pieces.get(self.aliases.get(name, name), ())

    def reads(self, tensors: Mapping[str, Tensor]) -> dict[TensorInfo, Tensor]:
        """Where the files' tensors go to fill parameters (or buffers), given by name."""
        return {
            piece.info: tensor[piece.place] if piece.place else tensor
            for name, tensor in tensors.items()
            for piece in self.pieces[name]
        }

    def phase(self, name: str) -> int | None:
        """Where a parameter begins within a page of its file, so that it can be read to memory at the same phase
        directly; None where it is read in several pieces, decoded, or not at all."""
        pieces = self.pieces.get(name, ())
        read_as_it_is = len(pieces) == 1 and not pieces[0].place and not pieces[0].info.encoding
        return pieces[0].info.begin % PAGE if read_as_it_is else None

    def kept_shapes(self, layer: Layer, kept: tuple[int, ...]) -> dict[str, Shape]:
        """Shapes of a layer's parameters when kept[b] of the neurons of its block b stay."""
        shapes = {name: self.shapes[layer.prefix + name] for name in layer.fixed}
        for block, k in zip(layer.blocks, kept, strict=True):
            for name, rows in block.rows.items():
                shape = list(self.shapes[layer.prefix + name])
                shape[rows.axis + bool(block.routed)] = 2 * k if rows.halves else k
                shapes[name] = tuple(shape)
        return shapes
