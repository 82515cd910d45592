"""Memory for one layer's kept weights, allocated before anything is read; or memory that layers pass through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..memory.arena import ALIGN, Arena, arenas_on
from ..model.layout import Block, Layer, ModelLayout
from ..planning.rows import STAGING_LAYERS
from ..planning.sizes import Kept, model_sizes
from ..quant.precision import NATIVE, Precision
from ..quant.weight import Scratch
from .gather import Resident, allocate_block, allocate_side_by_side

QKV = {"q_proj", "k_proj", "v_proj"}


@dataclass
class ResidentLayer:
    """A layer's parameters by name, with the kept neurons only, in the formats of `precision`.

    By block: `kept`, how many; `statistics` (F,) or (E, F), float32, and `kept_neurons` (k,) or (E, k), int64, are the
    prompt's once the layer has passed, if the block is pruned. They are allocated beforehand: small blocks that stay,
    allocated between activations, would tear the heap into holes.
    `complete`: the tensors have been filled, so that another prompt need only read the neurons again.
    `moves`: while a prompt passes, the block's memory may go to another layer, so that every prompt fills it again.
    `scratch`: of all layers together, while one passes."""

    tensors: dict[str, Resident]
    kept: tuple[int, ...]
    precision: Precision
    device: str
    statistics: tuple[Tensor, ...]
    kept_neurons: tuple[Tensor, ...]
    scratch: Scratch
    complete: bool = False
    moves: bool = False


def resident_layers(
    layout: ModelLayout, kept: Kept, devices: Sequence[str], precision: Precision = NATIVE
) -> list[ResidentLayer]:
    """Memory for every layer with kept[i] neurons (by block), on devices[i]; nothing is read yet."""
    sizes = model_sizes(layout)
    held = [
        size.fixed_in(precision) + size.feed_forward(k, precision) for size, k in zip(sizes.layers, kept, strict=True)
    ]
    arenas = arenas_on(devices, held)
    scratches = {device: Scratch(sizes.widest, layout.dtype.itemsize, device) for device in arenas}
    layers = zip(layout.layers, kept, devices, strict=True)
    return [_allocate(layout, layer, k, (arenas[d], arenas[d]), scratches[d], precision, d) for layer, k, d in layers]


def another_set(layout: ModelLayout, layers: Sequence[ResidentLayer]) -> list[ResidentLayer]:
    """Memory for another prompt's kept neurons beside `layers`; all else is shared with them."""
    sizes, precision = model_sizes(layout).layers, layers[0].precision
    each = zip(sizes, layers, strict=True)
    held = [size.feed_forward(layer.kept, precision) for size, layer in each]
    arenas = arenas_on([layer.device for layer in layers], held)
    other = []
    for layer, resident in zip(layout.layers, layers, strict=True):
        tensors, arena = dict(resident.tensors), arenas[resident.device]
        for block, k in zip(layer.blocks, resident.kept, strict=True):
            if k < block.neurons:
                tensors |= allocate_block(arena, block, _shapes(layout, layer, block), k, precision, layout.dtype)
        own = replace(
            resident,
            tensors=tensors,
            statistics=tuple(torch.zeros_like(total) for total in resident.statistics),
            kept_neurons=tuple(chosen.clone() for chosen in resident.kept_neurons),
            complete=True,  # `layers` fill what is shared
        )
        other.append(own)
    return other


def passing_layers(layout: ModelLayout, kept: Kept, device: str = "cpu") -> list[ResidentLayer]:
    """Memory that layers pass through, each to be used up before the next: for an export, or an evaluation."""
    sizes = model_sizes(layout)
    scratch = Scratch(sizes.widest, layout.dtype.itemsize, device)
    fixed = [Arena(max(layer.fixed for layer in sizes.layers), device) for _ in range(STAGING_LAYERS)]
    size = max(layer.feed_forward(k) for layer, k in zip(sizes.layers, kept, strict=True))
    each = zip(sizes.layers, kept, strict=True)
    whole = any(n == k for layer, ks in each for n, k in zip(layer.whole, ks, strict=True))
    compact = [Arena(size, device) for _ in range(STAGING_LAYERS if whole else 1)]  # if whole, the reader writes to it
    layers = []
    for index, (layer, k) in enumerate(zip(layout.layers, kept, strict=True)):
        arenas = fixed[index % STAGING_LAYERS], compact[index % len(compact)]
        for arena in arenas:
            arena.rewind()
        layers.append(_allocate(layout, layer, k, arenas, scratch, NATIVE, device))
    return layers


def _allocate(
    layout: ModelLayout,
    layer: Layer,
    kept: tuple[int, ...],
    arenas: tuple[Arena, Arena],
    scratch: Scratch,
    precision: Precision,
    device: str,
) -> ResidentLayer:
    """`arenas`: of what has no neurons, and of the neurons."""
    fixed, neurons = arenas
    tensors: dict[str, Resident] = {}
    matrices = layer.matrices if precision.others else {}
    for name in layer.fixed:
        if name not in matrices:
            tensors[name] = _allocate_whole(layout, layer, name, fixed)
    for names in _side_by_side(matrices):
        sizes = {name: matrices[name] for name in names}
        tensors |= allocate_side_by_side(precision.others, fixed, sizes, layout.dtype)
    for block, k in zip(layer.blocks, kept, strict=True):
        if k == block.neurons and not precision.kept:
            tensors |= {name: _allocate_whole(layout, layer, name, neurons) for name in block.rows}
        else:
            tensors |= allocate_block(neurons, block, _shapes(layout, layer, block), k, precision, layout.dtype)
    statistics = tuple(torch.zeros(b.statistic_shape, dtype=torch.float32, device=device) for b in layer.blocks)
    kept_neurons = tuple(
        torch.arange(k, device=device).expand(*b.statistic_shape[:-1], k).contiguous()
        for b, k in zip(layer.blocks, kept, strict=True)
    )
    return ResidentLayer(tensors, kept, precision, device, statistics, kept_neurons, scratch)


def _side_by_side(matrices: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Names of matrices that the same states enter: those of queries, keys and values, by their modules' names."""
    groups: dict[Any, list[str]] = {}
    for name, (_, columns) in matrices.items():
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        groups.setdefault((parent, columns) if own in QKV else name, []).append(name)
    return list(groups.values())


def _shapes(layout: ModelLayout, layer: Layer, block: Block) -> dict[str, tuple[int, ...]]:
    return {name: layout.shapes[layer.prefix + name] for name in block.rows}


def _allocate_whole(layout: ModelLayout, layer: Layer, name: str, arena: Arena) -> Tensor:
    full = layer.prefix + name
    return arena.take(layout.shapes[full], layout.dtype, aligned_phase(layout.phase(full)))


def aligned_phase(phase: int | None) -> int | None:
    """A phase, unless it makes products slower: memory that is read more than once is not worth that."""
    return None if phase is None or phase % ALIGN else phase
