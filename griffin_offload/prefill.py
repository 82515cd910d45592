"""The sweep: one pass over the layers, which reads each once and leaves its experts behind.

For every decoder layer, in order: wait until it is read ► forward ► statistic ► select ► materialise ► release.
This is the only place that knows the order.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor

from .errors import NumericError
from .hooks import ObserveNeurons, StreamLayer
from .materialize import Resident, materialize, take_block, take_side_by_side
from .memory import steady_heap
from .packed import CHUNK, FORMATS, NATIVE, Precision, Scratch, Stored, Weight, dense_matrix, linear_module, take_weight
from .plan import STAGING_LAYERS, Kept
from .selection import Selection, magnitude
from .skeleton import Block, Layer, Skeleton
from .weights.arena import ALIGN, Arena, padded
from .weights.host import HostTier
from .weights.prefetch import Load, Prefetch
from .weights.reader import Reader
from .weights.upload import Upload

QKV = {"q_proj", "k_proj", "v_proj"}
READ_ROWS = 8 * CHUNK  # of a head that is packed as it is read
OnLayer = Callable[[int, int], None]


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
    experts: tuple[Tensor, ...]
    scratch: Scratch
    complete: bool = False
    moves: bool = False


def resident_layers(skeleton: Skeleton, kept: Kept, device: str, precision: Precision = NATIVE) -> list[ResidentLayer]:
    """Memory for every layer with kept[i] neurons (by block), on the device; nothing is read yet."""
    sizes = skeleton.sizes()
    arena = Arena(sizes.resident(kept, precision) - sizes.outside_in(precision), device)
    scratch = Scratch(sizes.widest, skeleton.dtype.itemsize, device)
    layers = zip(skeleton.layers, kept, strict=True)
    return [_take_layer(skeleton, layer, k, arena, arena, scratch, precision) for layer, k in layers]


def another_set(skeleton: Skeleton, layers: Sequence[ResidentLayer], device: str) -> list[ResidentLayer]:
    """Memory for another prompt's experts beside `layers`; all else is shared with them."""
    sizes, how = skeleton.sizes().layers, layers[0].precision
    arena = Arena(sum(size.feed_forward(layer.kept, how) for size, layer in zip(sizes, layers, strict=True)), device)
    other = []
    for layer, resident in zip(skeleton.layers, layers, strict=True):
        tensors = dict(resident.tensors)
        for block, k in zip(layer.blocks, resident.kept, strict=True):
            if k < block.neurons:
                tensors |= take_block(arena, block, _shapes(skeleton, layer, block), k, how, skeleton.dtype)
        statistics = tuple(torch.zeros_like(total) for total in resident.statistics)
        experts = tuple(chosen.clone() for chosen in resident.experts)
        # `complete`: what is shared, `layers` fill.
        other.append(replace(resident, tensors=tensors, statistics=statistics, experts=experts, complete=True))
    return other


def passing_layers(skeleton: Skeleton, kept: Kept, device: str = "cpu") -> list[ResidentLayer]:
    """Memory that layers pass through, each to be used up before the next: for an export, or an evaluation."""
    of_model = skeleton.sizes()
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
        if k == block.neurons and not how.experts:
            tensors |= {name: _take_whole(skeleton, layer, name, neurons) for name in block.rows}
        else:
            tensors |= take_block(neurons, block, _shapes(skeleton, layer, block), k, how, skeleton.dtype)
    device = neurons.memory.device
    statistics = tuple(torch.zeros(b.statistic_shape, dtype=torch.float32, device=device) for b in layer.blocks)
    experts = tuple(
        torch.arange(k, device=device).expand(*b.statistic_shape[:-1], k).contiguous()
        for b, k in zip(layer.blocks, kept, strict=True)
    )
    return ResidentLayer(tensors, kept, how, device.type, statistics, experts, scratch)


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
    return arena.take(skeleton.shapes[full], skeleton.dtype, _aligned(skeleton.phase(full)))


def _aligned(phase: int | None) -> int | None:
    """A phase, unless it makes products slower: memory that is read more than once is not worth that."""
    return None if phase is None or phase % ALIGN else phase


@dataclass
class _Staged:
    """One layer on its way: `dense`, what the prompt's forward uses.

    With an upload, `sent`: all that comes to a slot of the device."""

    dense: dict[str, Tensor]
    sent: dict[str, Tensor]


class Stream:
    """The layers of a skeleton, one at a time and in order: `onload(i)`, then `release(i)`. A context manager.

    Raises what the reader raises. `tier`: layers that stay in RAM for the next stream. `open`'s conductor is told of
    every layer's forward (see hooks.StreamLayer). `on_finished(i)` is called while layer i is whole in its resident
    memory, before the next layer runs.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        reader: Reader,
        layers: Sequence[ResidentLayer],
        *,
        copies: bool,
        steady: bool,
        tier: HostTier | None = None,
        on_layer: OnLayer | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> None:
        self._skeleton, self._layers = skeleton, layers
        self._on_layer, self._on_finished = on_layer, on_finished
        self._upload: Upload | None = None
        self._tier = tier or HostTier()
        self._staged, loads = self._stage(copies)
        self._steady = steady
        self._finite: list[tuple[int, Tensor]] = []
        self._prefetch = Prefetch(reader, loads, STAGING_LAYERS, self._upload)
        self._heap = ExitStack()

    def __len__(self) -> int:
        return len(self._layers)

    def open(self, conductor: Any) -> None:
        try:
            if self._steady:
                self._heap.enter_context(steady_heap())
            self._prefetch.__enter__()
            for index, layer in enumerate(self._skeleton.layers):
                add_hook_to_module(layer.module, StreamLayer(conductor, index))
            self._tell(0)
        except BaseException:  # Ctrl-C: nobody closes what was not opened
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks, stop the reader, let the staging go. Harmless when all layers have passed."""
        self._stop()
        for layer, resident in zip(self._skeleton.layers, self._layers, strict=True):
            remove_hook_from_module(layer.module)
            self.assign(layer, resident.tensors)

    def _stop(self) -> None:
        self._prefetch.close()
        self._staged, self._upload = [], None
        self._layers[0].scratch.free()
        self.settle()

    def settle(self) -> None:
        """From here on, what is freed goes back to the system (see memory.steady_heap)."""
        self._heap.close()

    def onload(self, index: int) -> dict[str, Tensor]:
        """A layer's weights in place. Returns what is dense of it, by name."""
        layer, resident, staged = self._skeleton.layers[index], self._layers[index], self._staged[index]
        self._prefetch.wait(index)
        self._tier.was_read(index)
        if self._upload:
            self._upload.arrive(index % STAGING_LAYERS)
        for name, tensor in staged.sent.items():
            if tensor is not staged.dense[name]:  # what stays moves on, within the device
                staged.dense[name].copy_(tensor)
        self.assign(layer, resident.tensors | staged.dense)
        return staged.dense

    def release(self, index: int) -> None:
        """After a layer's forward: its compact weights in place, its buffers given back."""
        layer, resident, dense = self._skeleton.layers[index], self._layers[index], self._staged[index].dense
        for name in layer.matrices:
            weight = resident.tensors[name]
            if not isinstance(weight, Tensor) and not resident.complete:
                matrix = dense_matrix(linear_module(layer.module, name), dense[name])
                cast("Stored", weight).fill(lambda begin, end, _: matrix[begin:end], resident.scratch)  # noqa: B023
        self.assign(layer, resident.tensors)
        if self._on_finished:
            self._on_finished(index)
        resident.complete = True
        if self._upload:
            self._upload.leave(index % STAGING_LAYERS)
        self._prefetch.release()
        if index + 1 == len(self._layers):
            self._stop()
        self._tell(index + 1)

    def check(self, index: int, hidden: Tensor) -> None:
        """Raises NumericError for NaN or infinite activations of layer `index`; on a GPU, which nobody waits for on the
        way, with the last layer."""
        self._finite.append((index, torch.isfinite(hidden).all()))
        if hidden.is_cuda and index + 1 < len(self._layers):
            return
        for number, finite in self._finite:
            if not finite:
                dense = self._staged[index].dense if number == index else {}
                raise NumericError(_what_is_not_finite(self._skeleton, self._skeleton.layers[number], dense))
        self._finite = []

    def assign(self, layer: Layer, tensors: Mapping[str, Resident]) -> None:
        for name, tensor in tensors.items():
            self._skeleton.assign(layer.prefix + name, tensor)

    def _stage(self, copies: bool) -> tuple[list[_Staged], list[Load]]:
        """Buffers for what is read. Kept whole and on the CPU, a tensor is read straight to where it stays.

        `copies`: the forward's tensors are not where the reader can write (a GPU), so that each is copied there."""
        skeleton, sizes = self._skeleton, self._skeleton.sizes().layers
        device = self._layers[0].device
        staged_size = skeleton.sizes().staged(tuple(layer.kept for layer in self._layers), self._layers[0].precision)
        whole = max(size.fixed + size.feed_forward(size.whole) for size in sizes)
        ring = [Arena(staged_size) for _ in range(0 if copies else STAGING_LAYERS)]
        upload = self._upload = Upload(whole, STAGING_LAYERS, device) if copies else None
        staged, loads = [], []
        for index, (layer, resident) in enumerate(zip(skeleton.layers, self._layers, strict=True)):
            slot = index % STAGING_LAYERS
            cut = _read_again(layer, resident)
            stays = {n: t for n, t in resident.tensors.items() if n not in cut and isinstance(t, Tensor)}
            dense = {} if resident.complete else stays
            stay = list(dense)
            held = self._tier.take(
                index,
                {name: skeleton.shapes[layer.prefix + name] for name in cut},
                skeleton.dtype,
                {name: skeleton.phase(layer.prefix + name) for name in cut},
            )
            read, copied, count, sent = dense, [], 0, {}
            if upload:
                both = upload.host[slot], upload.there[slot]
                read, sent = (self._take(arena, layer, stay + cut, aligned=True) for arena in both)
                dense |= {name: sent[name] for name in cut}
                copied, count = [(tensor, read[name]) for name, tensor in held.items()], upload.host[slot].used
                read |= held
            else:
                dense |= held or self._take(ring[slot], layer, cut)
            known = held if self._tier.is_read(index) else {}
            reads = {layer.prefix + name: tensor for name, tensor in read.items() if name not in known}
            staged.append(_Staged(dense, sent))
            loads.append(Load(skeleton.reads(reads), copied, count))
        return staged, loads

    def _take(self, arena: Arena, layer: Layer, names: Sequence[str], aligned: bool = False) -> dict[str, Tensor]:
        """All of an arena for these tensors, whole, at their files' phases; `aligned`: at such as products like."""
        arena.rewind()
        tensors = {}
        for name in names:
            phase = self._skeleton.phase(layer.prefix + name)
            shape = self._skeleton.shapes[layer.prefix + name]
            tensors[name] = arena.take(shape, self._skeleton.dtype, _aligned(phase) if aligned else phase)
        return tensors

    def _tell(self, done: int) -> None:
        if self._on_layer:
            self._on_layer(done, len(self._layers))


def _read_again(layer: Layer, resident: ResidentLayer) -> list[str]:
    """What every prompt reads, since it does not stay as it is read."""
    how = resident.precision
    blocks = zip(layer.blocks, resident.kept, strict=True)
    cut = [name for block, k in blocks if k < block.neurons or how.experts or resident.moves for name in block.rows]
    return cut + (list(layer.matrices) if how.others else [])


class Pruner:
    """Chooses and gathers the experts of one prompt (or of one batch, together), layer by layer.

    `weights` (B T,), float32: what each token counts (see neuron_statistic)."""

    def __init__(
        self,
        skeleton: Skeleton,
        layers: Sequence[ResidentLayer],
        selection: Selection,
        weights: Tensor | None = None,
    ) -> None:
        self._skeleton, self._layers = skeleton, layers
        self._selection, self._weights = selection, weights
        self._observers: list[ObserveNeurons] = []

    def begin(self, index: int) -> None:
        """Before a layer's forward over the prompt: observe its z."""
        layer, resident = self._skeleton.layers[index], self._layers[index]
        for block, kept, total in zip(layer.blocks, resident.kept, resident.statistics, strict=True):
            if kept < block.neurons:
                pieces = self._skeleton.pieces_of(layer, block)
                self._observers.append(ObserveNeurons(layer.module, block.path, total.zero_(), self._weights, pieces))

    def end(self, index: int, dense: Mapping[str, Tensor]) -> None:
        """After it: choose, and bring the experts from the dense weights to where they stay."""
        self.stop()
        self.keep(index, dense)

    def keep(self, index: int, dense: Mapping[str, Tensor]) -> None:
        """Choose by the statistics as they are, and gather."""
        layer, resident = self._skeleton.layers[index], self._layers[index]
        for place, (block, kept, total, experts) in enumerate(
            zip(layer.blocks, resident.kept, resident.statistics, resident.experts, strict=True)
        ):
            if kept < block.neurons:
                weights = partial(block_magnitude, block, dense)
                experts.copy_(self._selection.choose(total, kept, index, weights, place))
            elif not resident.moves and (not resident.precision.experts or resident.complete):
                continue
            for name in block.rows:
                how, out = resident.precision, resident.tensors[name]
                materialize(block, name, dense[name], experts, how, out, resident.scratch)

    def stop(self) -> None:
        while self._observers:
            self._observers.pop().remove()


class Slots(Protocol):
    """Who says, when a layer's forward over the prompt is done, which memory its block gets (see skipper.py)."""

    def open(self) -> None: ...

    def left(self, index: int, hidden: Tensor) -> None:
        """`hidden` (..., T, D): what leaves the layer."""

    def close(self) -> None: ...


class Sweep:
    """Arms a skeleton's layers; the next forward of the model is the sweep. Use as a context manager.

    Raises, from within that forward, NumericError for NaN or infinite activations and what the reader raises.
    When the last layer has passed, hooks and staging are gone and the model is resident.
    """

    def __init__(self, stream: Stream, pruner: Pruner, slots: Slots | None = None) -> None:
        self.started = False
        self._stream, self._pruner, self._slots = stream, pruner, slots
        self._dense: Mapping[str, Tensor] = {}

    def __enter__(self) -> "Sweep":
        self._stream.open(self)
        if self._slots:
            self._slots.open()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._slots:
            self._slots.close()
        self._pruner.stop()
        self._stream.close()

    def enter(self, index: int, states: Tensor | None) -> None:
        self.started = True
        self._dense = self._stream.onload(index)
        self._pruner.begin(index)

    def leave(self, index: int, hidden: Tensor) -> None:
        self._stream.check(index, hidden)
        if self._slots:
            self._slots.left(index, hidden)
        self._pruner.end(index, self._dense)
        self._dense = {}
        self._stream.release(index)
        if index + 1 == len(self._stream):
            self._stream.close()


def load_outside(skeleton: Skeleton, reader: Reader, device: str, precision: Precision = NATIVE) -> None:
    """Read embeddings, final norm and head to the device, and buffers that a checkpoint holds. A head that is packed
    is packed as it is read, and the table stays in its file.

    Raises NumericError for NaN or infinite weights."""
    head = skeleton.head if precision.head else None
    skeleton.pack_head(None)
    left = {skeleton.table}
    if head:
        left |= {skeleton.aliases.get(name, name) for name in (head, skeleton.table_name)}
    names = [name for name in skeleton.outside if name not in left]
    arena = Arena(sum(padded(torch.Size(skeleton.shapes[name]).numel() * skeleton.dtype.itemsize) for name in names))
    tensors = {name: arena.take(skeleton.shapes[name], skeleton.dtype, skeleton.phase(name)) for name in names}
    buffers = {name: torch.empty_like(buffer, device="cpu") for name, buffer in skeleton.buffers.items()}
    reader.read(skeleton.reads(tensors | buffers))
    for name, tensor in tensors.items():
        _check_finite(skeleton, name, tensor)
        skeleton.assign(name, tensor.to(device))
    for name, buffer in buffers.items():
        skeleton.model.get_buffer(name).copy_(buffer)
    if skeleton.table:
        skeleton.assign(
            skeleton.table, torch.empty(0, skeleton.config.hidden_size, dtype=skeleton.dtype, device=device)
        )
    if head:
        skeleton.pack_head(_packed_head(skeleton, reader, head, device, precision.head))


def _packed_head(skeleton: Skeleton, reader: Reader, name: str, device: str, format: str) -> Weight:
    """The head, read and packed a few rows at a time: it is never whole in memory."""
    rows, columns = skeleton.shapes[name]
    arena = Arena(FORMATS[format].bytes(rows, columns, skeleton.dtype.itemsize), device)
    weight = take_weight(format, arena, rows, columns, skeleton.dtype)
    info = skeleton.pieces[skeleton.aliases.get(name, name)][0].info
    size = info.bytes // rows
    buffer = torch.empty(READ_ROWS, columns, dtype=skeleton.dtype)
    here = (0, 0)

    def read(begin: int, end: int, _: Scratch) -> Tensor:
        nonlocal here
        if end > here[1]:
            here = begin, min(begin + READ_ROWS, rows)
            part = replace(
                info, shape=(here[1] - begin, columns), begin=info.begin + begin * size, end=info.begin + here[1] * size
            )
            reader.read({part: buffer[: here[1] - begin]})
            _check_finite(skeleton, name, buffer[: here[1] - begin])
        return buffer[begin - here[0] : end - here[0]].to(device)

    weight.fill(read, Scratch(columns, skeleton.dtype.itemsize, device))
    return weight


def block_magnitude(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """(F,) or (E, F), float32, of a block's dense weights."""
    matrices = [name for name in block.rows if name != block.down and dense[name].ndim > 1 + bool(block.routed)]
    return magnitude([part for name in matrices for part in block.rows[name].split(dense[name])])


def _check_finite(skeleton: Skeleton, name: str, tensor: Tensor) -> None:
    for piece in tensor.view(-1).split(2**22):
        # A sum is many times as fast as a look at each, and finite only if all are (of another dtype it would copy).
        if not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            way_out = "; try --dtype bfloat16 or float32" if skeleton.dtype == torch.float16 else ""
            file = skeleton.pieces[skeleton.aliases.get(name, name)][0].info.file
            raise NumericError(f"{file}: {name} holds NaN or infinite weights{way_out}")


def _what_is_not_finite(skeleton: Skeleton, layer: Layer, dense: Mapping[str, Tensor]) -> str:
    try:
        for name, tensor in dense.items():
            _check_finite(skeleton, layer.prefix + name, tensor)
    except NumericError as error:
        return str(error)
    way_out = "" if skeleton.dtype == torch.float32 else f" in {skeleton.dtype}; try --dtype float32"
    return f"the activations of {layer.prefix.rstrip('.')} are NaN or infinite{way_out}"
