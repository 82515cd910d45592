"""A dense feed-forward block + the kept neurons -> the compact one: rows of up (and gate), columns of down."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.arena import Arena
from ..model.layout import Block, NeuronRows
from ..pruning.fold import ROWS, Change
from ..quant.formats import allocate_weight
from ..quant.joined import Split, take_joined
from ..quant.precision import Precision
from ..quant.products import dense_linear
from ..quant.weight import RowsOf, Scratch, Stored, Weight, chunks

Changes = Sequence[Change | None]
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


def allocate_block(
    arena: Arena, block: Block, shapes: Mapping[str, Sequence[int]], kept: int, precision: Precision, dtype: torch.dtype
) -> dict[str, Resident]:
    """Memory for `kept` neurons (of each expert) of a block, by parameter name; gate and up in one where that makes
    their products quicker. `shapes`: the whole parameters', as the model has them."""
    taken = {}
    if precision.kept and kept and not block.routed and (precision.rest is None or kept == block.neurons):
        ups = [name for name in block.rows if name != block.down and len(shapes[name]) == 2]
        sizes = {name: (_count(block.rows[name], kept), shapes[name][1 - block.rows[name].axis]) for name in ups}
        taken = allocate_side_by_side(precision.kept, arena, sizes, dtype)
    for name, shape in shapes.items():
        if name not in taken:
            taken[name] = _allocate_neurons(arena, block, name, shape, kept, precision, dtype)
    return taken


def allocate_side_by_side(
    format: str, arena: Arena, sizes: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> dict[str, Resident]:
    """Memory for packed matrices (rows, columns), by name, that the same states enter."""
    rows, columns = zip(*sizes.values(), strict=True)
    assert len(set(columns)) == 1
    return dict(zip(sizes, take_joined(format, arena, rows, columns[0], dtype), strict=True))


def _allocate_neurons(
    arena: Arena, block: Block, name: str, shape: Sequence[int], kept: int, precision: Precision, dtype: torch.dtype
) -> Resident:
    rows, down = block.rows[name], name == block.down
    each = list(shape[bool(block.routed) :])
    keeps_rest = precision.rest is not None and kept < block.neurons
    if len(each) == 1 or not (keeps_rest or (precision.kept and kept)):
        each[rows.axis] = _count(rows, block.neurons if keeps_rest else kept)
        return arena.take((*shape[: bool(block.routed)], *each), dtype)
    width = each[1 - rows.axis]

    def take(count: int, format: str) -> Stored:
        matrix = (width, count) if down else (_count(rows, count), width)
        return allocate_weight(format, arena, *matrix, dtype)

    def one() -> Weight:
        if not keeps_rest or precision.rest is None:
            return take(kept, precision.kept)
        counts = [(kept, precision.kept), (block.neurons - kept, precision.rest)][0 if kept else 1 :]
        parts = [take(count, format) for count, format in counts]
        return Split(parts, [count for count, _ in counts], down, rows.halves and not rows.interleaved)

    return [one() for _ in range(block.routed)] if block.routed else one()


def gather_block(
    block: Block,
    dense: Mapping[str, Tensor],
    kept_neurons: Tensor,
    precision: Precision,
    resident: Mapping[str, Resident],
    scratch: Scratch,
    changes: Changes = (),
) -> None:
    """Fill what `allocate_block` gave with the kept neurons, (k,) or (E, k), int64, and the rest where it is kept.

    `dense`: the whole parameters by name. `changes`: of the down projection's columns, one or of each expert."""
    for name, rows in block.rows.items():
        out, down = resident[name], name == block.down
        if isinstance(out, Tensor):
            chosen = kept_neurons
            if precision.rest is not None:  # a bias
                chosen = torch.cat([kept_neurons, _rest(kept_neurons, block.neurons)], -1)
            gather(dense[name], rows.index(chosen), rows.axis, out)
            for part, change in zip(out if block.routed else [out], changes if down else (), strict=False):
                if change:
                    take_over(part if rows.axis else part.t(), change)
            continue
        flipped = rows.axis == (0 if down else 1)
        each = [(dense[name], kept_neurons, out)]
        if isinstance(out, list):
            each = list(zip(dense[name], kept_neurons, out, strict=True))
        of_each = changes if down and changes else [None] * len(each)
        for (matrix, neurons, weight), change in zip(each, of_each, strict=True):
            _fill(weight, matrix.t() if flipped else matrix, rows, neurons, down, scratch, change)


def _fill(
    weight: Any,
    matrix: Tensor,
    rows: NeuronRows,
    kept_neurons: Tensor,
    down: bool,
    scratch: Scratch,
    change: Change | None,
) -> None:
    """Fill a weight, or the two parts of one, with neurons of a matrix (N, K)."""
    parts = [(weight, kept_neurons)]
    if isinstance(weight, Split):
        parts = list(zip(weight.parts, _both(kept_neurons, rows.neurons), strict=True))
    for part, neurons in parts:
        part.fill(rows_of(matrix, rows, neurons, down, change), scratch)


def rows_of(matrix: Tensor, rows: NeuronRows, neurons: Tensor, down: bool, change: Change | None = None) -> RowsOf:
    """Some neurons of a matrix (N, K), ascending, a few rows at a time: they are its columns (`down`), or its rows."""
    index = rows.index(neurons)
    if len(index) == matrix.shape[down]:
        return lambda begin, end, scratch: matrix[begin:end]

    def gathered(begin: int, end: int, scratch: Scratch) -> Tensor:
        if down:
            out = scratch.take((end - begin, len(index)), matrix.dtype)
            torch.gather(matrix[begin:end], 1, index.expand(end - begin, -1), out=out)
            if change:
                take_over(out, change, begin)
            return out
        out = scratch.take((end - begin, matrix.shape[1]), matrix.dtype)
        return torch.index_select(matrix, 0, index[begin:end], out=out)

    return gathered


def take_over(rows: Tensor, change: Change, first: int = 0) -> None:
    """Adds a change to kept columns (D, k), or to so many rows of them from the `first` on."""
    for begin, end in chunks(len(rows), ROWS):
        rows[begin:end] += dense_linear(change.left[first + begin : first + end], change.right.t())


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
    count = neurons - kept_neurons.shape[-1]
    return (_places if is_rest.device.type == "cpu" else _places_unseen)(is_rest, count)


def _places(mask: Tensor, count: int) -> Tensor:
    """Where a mask (..., F) with `count` set in each row is set: (..., count), ascending."""
    return mask.nonzero()[:, -1].view(*mask.shape[:-1], count)


def _places_unseen(mask: Tensor, count: int) -> Tensor:
    """The same without a look at the mask, which the host would wait for on a GPU; slower on a CPU."""
    return mask.byte().argsort(descending=True, stable=True)[..., :count]
