"""The layers of a model, one at a time: read ahead, in place for a forward, then what stays of them, and room again."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor

from ..checkpoint.reader import Reader
from ..errors import NumericError
from ..memory.arena import Arena
from ..memory.heap import steady_heap
from ..memory.host_cache import HostTier
from ..memory.upload import Upload
from ..model.hooks import StreamLayer
from ..model.layout import Layer
from ..model.skeleton import Skeleton
from ..options import OnLayer
from ..planning.rows import STAGING_LAYERS
from ..planning.sizes import model_sizes
from ..quant.weight import Stored, dense_matrix, linear_module
from .gather import Resident
from .prefetch import Load, Prefetch
from .resident_layer import ResidentLayer, aligned_phase


@dataclass
class _Staged:
    """One layer on its way: `dense`, what the prompt's forward uses.

    With an upload, `sent`: all that comes to a slot of the device."""

    dense: dict[str, Tensor]
    sent: dict[str, Tensor]


class LayerStream:
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
        skeleton, sizes = self._skeleton, model_sizes(self._skeleton).layers
        device = self._layers[0].device
        staged_size = model_sizes(skeleton).staged(
            tuple(layer.kept for layer in self._layers), self._layers[0].precision
        )
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
            tensors[name] = arena.take(shape, self._skeleton.dtype, aligned_phase(phase) if aligned else phase)
        return tensors

    def _tell(self, done: int) -> None:
        if self._on_layer:
            self._on_layer(done, len(self._layers))


def _read_again(layer: Layer, resident: ResidentLayer) -> list[str]:
    """What every prompt reads, since it does not stay as it is read."""
    how = resident.precision
    blocks = zip(layer.blocks, resident.kept, strict=True)
    cut = [name for block, k in blocks if k < block.neurons or how.kept or resident.moves for name in block.rows]
    return cut + (list(layer.matrices) if how.others else [])


def check_finite(skeleton: Skeleton, name: str, tensor: Tensor) -> None:
    for piece in tensor.view(-1).split(2**22):
        # A sum is many times as fast as a look at each, and finite only if all are (of another dtype it would copy).
        if not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            way_out = "; try --dtype bfloat16 or float32" if skeleton.dtype == torch.float16 else ""
            file = skeleton.pieces[skeleton.aliases.get(name, name)][0].info.file
            raise NumericError(f"{file}: {name} holds NaN or infinite weights{way_out}")


def _what_is_not_finite(skeleton: Skeleton, layer: Layer, dense: Mapping[str, Tensor]) -> str:
    try:
        for name, tensor in dense.items():
            check_finite(skeleton, layer.prefix + name, tensor)
    except NumericError as error:
        return str(error)
    way_out = "" if skeleton.dtype == torch.float32 else f" in {skeleton.dtype}; try --dtype float32"
    return f"the activations of {layer.prefix.rstrip('.')} are NaN or infinite{way_out}"
