"""What stays of each layer, in memory taken before anything is read; or memory that layers pass through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..memory.arena import ALIGN, Arena
from ..model.layout import Block, Layer
from ..model.skeleton import Skeleton
from ..planning.rows import STAGING_LAYERS
from ..planning.sizes import Kept, model_sizes
from ..quant.precision import NATIVE, Precision
from ..quant.weight import Scratch
from .gather import Resident, take_block, take_side_by_side

QKV = {"q_proj", "k_proj", "v_proj"}


@dataclass
class ResidentLayer:
    """What stays of one layer: its parameters by name, of the neurons the kept ones, in the formats of `precision`.

    By block: `kept`, how many; `statistics` (F,) or (E, F), float32, and `experts` (k,) or (E, k), int64, are the
    prompt's once the layer has passed, if the block is pruned. They are taken beforehand: small blocks that stay,
    taken between activations, would tear the heap into holes. `complete` says that the tensors have been filled, so
    that another prompt need only read the neurons again. `moves`: while a prompt passes, the memory of its block may
    go to another layer, so that every prompt fills it again. `scratch`: of all layers together, while one passes."""

    tensors: dict[str, Resident]
    kept: tuple[int, ...]
    precision: Precision
    device: str
    statistics: tuple[Tensor, ...]
    kept_neurons: tuple[Tensor, ...]
    scratch: Scratch
    complete: bool = False
    moves: bool = False


def resident_layers(skeleton: Skeleton, kept: Kept, device: str, precision: Precision = NATIVE) -> list[ResidentLayer]:
    """Memory for every layer with kept[i] neurons (by block), on the device; nothing is read yet."""
    sizes = model_sizes(skeleton)
    arena = Arena(sizes.resident(kept, precision) - sizes.outer_in(precision), device)
    scratch = Scratch(sizes.widest, skeleton.dtype.itemsize, device)
    layers = zip(skeleton.layers, kept, strict=True)
    return [_take_layer(skeleton, layer, k, arena, arena, scratch, precision) for layer, k in layers]


def another_set(skeleton: Skeleton, layers: Sequence[ResidentLayer], device: str) -> list[ResidentLayer]:
    """Memory for another prompt's kept_neurons beside `layers`; all else is shared with them."""
    sizes, how = model_sizes(skeleton).layers, layers[0].precision
    arena = Arena(sum(size.feed_forward(layer.kept, how) for size, layer in zip(sizes, layers, strict=True)), device)
    other = []
    for layer, resident in zip(skeleton.layers, layers, strict=True):
        tensors = dict(resident.tensors)
        for block, k in zip(layer.blocks, resident.kept, strict=True):
            if k < block.neurons:
                tensors |= take_block(arena, block, _shapes(skeleton, layer, block), k, how, skeleton.dtype)
        statistics = tuple(torch.zeros_like(total) for total in resident.statistics)
        kept_neurons = tuple(chosen.clone() for chosen in resident.kept_neurons)
        # `complete`: what is shared, `layers` fill.
        other.append(
            replace(resident, tensors=tensors, statistics=statistics, kept_neurons=kept_neurons, complete=True)
        )
    return other


def passing_layers(skeleton: Skeleton, kept: Kept, device: str = "cpu") -> list[ResidentLayer]:
    """Memory that layers pass through, each to be used up before the next: for an export, or an evaluation."""
    of_model = model_sizes(skeleton)
    sizes, scratch = of_model.layers, Scratch(of_model.widest, skeleton.dtype.itemsize, device)
    fixed = [Arena(max(layer.fixed for layer in sizes), device) for _ in range(STAGING_LAYERS)]
    size = max(layer.feed_forward(k) for layer, k in zip(sizes, kept, strict=True))
    whole = any(n == k for layer, ks in zip(sizes, kept, strict=True) for n, k in zip(layer.whole, ks, strict=True))
    compact = [Arena(size, device) for _ in range(STAGING_LAYERS if whole else 1)]  # if whole, the reader writes to it
    layers = []
    for index, (layer, k) in enumerate(zip(skeleton.layers, kept, strict=True)):
        ring = fixed[index % STAGING_LAYERS]
        ring.rewind()
        neurons = compact[index % len(compact)]
        neurons.rewind()
        layers.append(_take_layer(skeleton, layer, k, ring, neurons, scratch))
    return layers


def _take_layer(
    skeleton: Skeleton,
    layer: Layer,
    kept: tuple[int, ...],
    fixed: Arena,
    neurons: Arena,
    scratch: Scratch,
    how: Precision = NATIVE,
) -> ResidentLayer:
    tensors: dict[str, Resident] = {}
    matrices = layer.matrices if how.others else {}
    for name in layer.fixed:
        if name not in matrices:
            tensors[name] = _take_whole(skeleton, layer, name, fixed)
    for names in _side_by_side(matrices):
        tensors |= take_side_by_side(how.others, fixed, {name: matrices[name] for name in names}, skeleton.dtype)
    for block, k in zip(layer.blocks, kept, strict=True):
        if k == block.neurons and not how.kept:
            tensors |= {name: _take_whole(skeleton, layer, name, neurons) for name in block.rows}
        else:
            tensors |= take_block(neurons, block, _shapes(skeleton, layer, block), k, how, skeleton.dtype)
    device = neurons.memory.device
    statistics = tuple(torch.zeros(b.statistic_shape, dtype=torch.float32, device=device) for b in layer.blocks)
    kept_neurons = tuple(
        torch.arange(k, device=device).expand(*b.statistic_shape[:-1], k).contiguous()
        for b, k in zip(layer.blocks, kept, strict=True)
    )
    return ResidentLayer(tensors, kept, how, device.type, statistics, kept_neurons, scratch)


def _side_by_side(matrices: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Names of those that the same states enter: what makes queries, keys and values, by their modules' names."""
    groups: dict[Any, list[str]] = {}
    for name, (_, columns) in matrices.items():
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        groups.setdefault((parent, columns) if own in QKV else name, []).append(name)
    return list(groups.values())


def _shapes(skeleton: Skeleton, layer: Layer, block: Block) -> dict[str, tuple[int, ...]]:
    return {name: skeleton.shapes[layer.prefix + name] for name in block.rows}


def _take_whole(skeleton: Skeleton, layer: Layer, name: str, arena: Arena) -> Tensor:
    full = layer.prefix + name
    return arena.take(skeleton.shapes[full], skeleton.dtype, aligned_phase(skeleton.phase(full)))


def aligned_phase(phase: int | None) -> int | None:
    """A phase, unless it makes products slower: memory that is read more than once is not worth that."""
    return None if phase is None or phase % ALIGN else phase
