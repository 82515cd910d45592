"""A dense feed-forward block + the kept neurons -> the compact one: rows of up (and gate), columns of down."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.arena import Arena
from ..model.layout import Block, NeuronRows
from ..quant.formats import allocate_weight
from ..quant.joined import Split, take_joined
from ..quant.precision import Precision
from ..quant.weight import RowsOf, Scratch, Stored, Weight

Resident = Tensor | Weight | list[Weight]  # packed: a list where there is one for each routed expert


def gather(dense: Tensor, index: Tensor, axis: int, out: Tensor) -> None:
    """Copy rows (axis 0) or columns (axis 1) of `dense` into `out`; index (k,), int64.

    Routed experts, `dense` (E, ., .) and index (E, k): each expert its own; `axis` counts within one expert."""
    if index.ndim == 2:
        for part, chosen, target in zip(dense, index, out, strict=True):
            gather(part, chosen, axis, target)
    elif axis == 0:
        torch.index_select(dense, 0, index, out=out)
    else:  # four times as fast as index_select along rows (measured: 5 ms, not 22, for half of 3072 x 8192)
        torch.gather(dense, 1, index.expand(len(dense), -1), out=out)


def take_block(
    arena: Arena, block: Block, shapes: Mapping[str, Sequence[int]], kept: int, how: Precision, dtype: torch.dtype
) -> dict[str, Resident]:
    """Memory for the parameters of a block, by name: `shapes` are whole, as the model has them. Of the neurons `kept`,
    in each expert; gate and up in one, where that makes their products quicker."""
    taken = {}
    if how.kept and kept and not block.routed and (how.rest is None or kept == block.neurons):
        ups = [name for name in block.rows if name != block.down and len(shapes[name]) == 2]
        sizes = {name: (_count(block.rows[name], kept), shapes[name][1 - block.rows[name].axis]) for name in ups}
        taken = take_side_by_side(how.kept, arena, sizes, dtype)
    for name, shape in shapes.items():
        if name not in taken:
            taken[name] = _take_neurons(arena, block, name, shape, kept, how, dtype)
    return taken


def take_side_by_side(
    format: str, arena: Arena, sizes: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> dict[str, Resident]:
    """Memory for packed matrices (rows, columns), by name, that the same states enter."""
    rows, columns = zip(*sizes.values(), strict=True)
    assert len(set(columns)) == 1
    return dict(zip(sizes, take_joined(format, arena, rows, columns[0], dtype), strict=True))


def _take_neurons(
    arena: Arena, block: Block, name: str, shape: Sequence[int], kept: int, how: Precision, dtype: torch.dtype
) -> Resident:
    rows, down = block.rows[name], name == block.down
    each = list(shape[bool(block.routed) :])
    keeps_rest = how.rest is not None and kept < block.neurons
    if len(each) == 1 or not (keeps_rest or (how.kept and kept)):
        each[rows.axis] = _count(rows, block.neurons if keeps_rest else kept)
        return arena.take((*shape[: bool(block.routed)], *each), dtype)
    width = each[1 - rows.axis]

    def take(count: int, format: str) -> Stored:
        matrix = (width, count) if down else (_count(rows, count), width)
        return allocate_weight(format, arena, *matrix, dtype)

    def one() -> Weight:
        if not keeps_rest or how.rest is None:
            return take(kept, how.kept)
        counts = [(kept, how.kept), (block.neurons - kept, how.rest)][0 if kept else 1 :]
        parts = [take(count, format) for count, format in counts]
        return Split(parts, [count for count, _ in counts], down, rows.halves and not rows.interleaved)

    return [one() for _ in range(block.routed)] if block.routed else one()


def materialize(
    block: Block, name: str, dense: Tensor, kept_neurons: Tensor, how: Precision, out: Resident, scratch: Scratch
) -> None:
    """Fill what `take_block` gave with the neurons `experts`, (k,) or (E, k), int64, and the rest where it is kept.

    `dense`: the parameter, whole."""
    rows, down = block.rows[name], name == block.down
    if isinstance(out, Tensor):
        if how.rest is not None:  # a bias
            kept_neurons = torch.cat([kept_neurons, _rest(kept_neurons, block.neurons)], -1)
        gather(dense, rows.index(kept_neurons), rows.axis, out)
        return
    flipped = rows.axis == (0 if down else 1)
    each = zip(dense, kept_neurons, out, strict=True) if isinstance(out, list) else [(dense, kept_neurons, out)]
    for matrix, chosen, weight in each:
        lying = matrix.t() if flipped else matrix
        parts: Any = [(weight, chosen)]
        if isinstance(weight, Split):
            parts = zip(weight.parts, _both(chosen, block.neurons), strict=True)
        for part, neurons in parts:
            part.fill(rows_of(lying, rows, neurons, down), scratch)


def rows_of(matrix: Tensor, rows: NeuronRows, neurons: Tensor, down: bool) -> RowsOf:
    """Some neurons of a matrix (N, K), a few rows at a time: they are its columns (`down`), or its rows."""
    index = rows.index(neurons)

    def gathered(begin: int, end: int, scratch: Scratch) -> Tensor:
        if down:
            out = scratch.take((end - begin, len(index)), matrix.dtype)
            return torch.gather(matrix[begin:end], 1, index.expand(end - begin, -1), out=out)
        out = scratch.take((end - begin, matrix.shape[1]), matrix.dtype)
        return torch.index_select(matrix, 0, index[begin:end], out=out)

    return gathered


def _count(rows: NeuronRows, neurons: int) -> int:
    """NeuronRows of a matrix that so many neurons have."""
    return 2 * neurons if rows.halves else neurons


def _both(kept_neurons: Tensor, neurons: int) -> list[Tensor]:
    """Experts (k,) and the rest, those of the two that there are."""
    return [part for part in (kept_neurons, _rest(kept_neurons, neurons)) if len(part)]


def _rest(kept_neurons: Tensor, neurons: int) -> Tensor:
    """The neurons that are not among `experts`, in order: (k,) -> (F - k,), and (E, k) -> (E, F - k)."""
    is_rest = torch.ones(*kept_neurons.shape[:-1], neurons, dtype=torch.bool, device=kept_neurons.device)
    is_rest.scatter_(-1, kept_neurons, False)
    return is_rest.nonzero()[:, -1].view(*kept_neurons.shape[:-1], -1)
