"""Where each layer is read to, and what of it is on the device while it runs.

On the CPU a tensor that is kept whole is read straight to where it stays, everything else into a ring of buffers. For a
GPU all of a layer passes through pinned pieces of host memory (memory/upload.py)."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ..checkpoint.headers import TensorInfo
from ..checkpoint.parts import Part, pieces, space
from ..checkpoint.reader import Reader, as_bytes
from ..memory.arena import PAGE, Arena
from ..memory.host_cache import HostTier
from ..memory.upload import Ring, Upload
from ..model.layout import Layer, ModelLayout
from ..planning.rows import STAGING_LAYERS
from ..planning.sizes import model_sizes
from .prefetch import Load
from .resident_layer import ResidentLayer, aligned_phase


class CpuStaging:
    """`dense[i]`: the tensors of layer i that its forward uses, by name."""

    def __init__(self, layout: ModelLayout, layers: Sequence[ResidentLayer], tier: HostTier, reader: Reader) -> None:
        """`tier`: layers that stay in RAM for the next pass, where they are then found."""
        self._layout, self._tier, self._reader = layout, tier, reader
        self.dense: list[dict[str, Tensor]] = []
        self._to_read: list[dict[TensorInfo, Tensor]] = []
        self._make_buffers(layers)
        for index, (layer, resident) in enumerate(zip(layout.layers, layers, strict=True)):
            passing = _passing(layer, resident)
            own = {n: t for n, t in resident.tensors.items() if n not in passing and isinstance(t, Tensor)}
            self._stage(index, layer, {} if resident.complete else own, passing)

    def loads(self) -> list[Load]:
        """What brings each layer to its tensors. It holds the buffers, so it is made for a pass and goes with it."""
        return [Load([partial(self._reader.read, reads)]) for reads in self._to_read]

    def arrive(self, index: int) -> None:
        """Layer `index` has been read: its tensors are ready for what is computed from here on."""

    def leave(self, index: int) -> None:
        """Nothing computed from here on reads the layer's buffers."""

    def close(self) -> None:
        """No layer is on its way any more: the buffers may go."""

    def _make_buffers(self, layers: Sequence[ResidentLayer]) -> None:
        staged = model_sizes(self._layout).staged(tuple(layer.kept for layer in layers), layers[0].precision)
        self._ring = [Arena(staged) for _ in range(STAGING_LAYERS)]

    def _stage(self, index: int, layer: Layer, own: dict[str, Tensor], passing: Sequence[str]) -> None:
        held = self._held(index, layer, passing)
        dense = own | (held or self._allocate(self._ring[index % STAGING_LAYERS], layer, passing))
        self.dense.append(dense)
        known = held if self._tier.is_read(index) else {}
        self._to_read.append(self._reads(layer, {n: tensor for n, tensor in dense.items() if n not in known}))

    def _held(self, index: int, layer: Layer, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of a layer that the tier holds, read already or not yet; {} where it holds none."""
        full = {name: layer.prefix + name for name in names}
        shapes = {name: self._layout.shapes[full[name]] for name in names}
        return self._tier.take(index, shapes, self._layout.dtype, {n: self._layout.phase(full[n]) for n in names})

    def _reads(self, layer: Layer, tensors: Mapping[str, Tensor]) -> dict[TensorInfo, Tensor]:
        """Where the files' tensors go."""
        return self._layout.reads({layer.prefix + name: tensor for name, tensor in tensors.items()})

    def _allocate(self, arena: Arena, layer: Layer, names: Sequence[str], aligned: bool = False) -> dict[str, Tensor]:
        """All of an arena for these tensors, whole, at their files' phases; `aligned`: only at phases that products
        are quick at."""
        arena.rewind()
        tensors = {}
        for name in names:
            phase = self._layout.phase(layer.prefix + name)
            shape = self._layout.shapes[layer.prefix + name]
            tensors[name] = arena.take(shape, self._layout.dtype, aligned_phase(phase) if aligned else phase)
        return tensors


class UploadStaging(CpuStaging):
    """The same for a device that the reader cannot write to: read to pinned pieces, each sent to the layer's slot on
    the device; what stays is copied from there, within the device. The tier gets its copy from the pinned piece. What
    the tier has page-locked needs no piece."""

    def __init__(
        self, layout: ModelLayout, layers: Sequence[ResidentLayer], tier: HostTier, reader: Reader, ring: Ring
    ) -> None:
        self._sent: list[dict[str, Tensor]] = []
        self._ring_size, self._work = ring, list[list[list[Part]]]()
        self._locked: list[list[tuple[Tensor, Tensor]]] = []  # by layer: from RAM, to its slot
        self._admitted: dict[int, bool] = {}
        self._lock = threading.Lock()
        super().__init__(layout, layers, tier, reader)
        largest = max((space(parts) for layer in self._work for parts in layer), default=0)
        ring = Ring(ring.threads, min(ring.pieces, sum(map(len, self._work))), largest)
        self._upload = Upload(self._slots, ring, reader.clock)

    def loads(self) -> list[Load]:
        return [Load(self._jobs(index), partial(self._complete, index)) for index in range(len(self._work))]

    def _jobs(self, index: int) -> list[Callable[[], None]]:
        known = self._tier.is_read(index)
        jobs: list[Callable[[], None]] = [partial(self._bring, index, parts, known) for parts in self._work[index]]
        if self._locked[index]:
            jobs.append(partial(self._upload_locked, index))
        return jobs

    def arrive(self, index: int) -> None:
        self._upload.arrive(self._slot[index])
        for name, tensor in self._sent[index].items():
            if tensor is not self.dense[index][name]:
                self.dense[index][name].copy_(tensor)

    def leave(self, index: int) -> None:
        self._upload.leave(self._slot[index])

    def close(self) -> None:
        self._upload.close()

    def _make_buffers(self, layers: Sequence[ResidentLayer]) -> None:
        whole: dict[str, int] = {}  # bytes of the largest layer on each device
        for size, layer in zip(model_sizes(self._layout).layers, layers, strict=True):
            whole[layer.device] = max(whole.get(layer.device, 0), size.fixed + size.feed_forward(size.whole))
        self._slots = [Arena(size, device) for device, size in whole.items() for _ in range(STAGING_LAYERS)]
        first = {device: number * STAGING_LAYERS for number, device in enumerate(whole)}
        self._slot = [first[layer.device] + index % STAGING_LAYERS for index, layer in enumerate(layers)]

    def _stage(self, index: int, layer: Layer, own: dict[str, Tensor], passing: Sequence[str]) -> None:
        held = self._held(index, layer, passing)
        sent = self._allocate(self._slots[self._slot[index]], layer, [*own, *passing], aligned=True)
        self._sent.append(sent)
        self.dense.append(own | {name: sent[name] for name in passing})
        locked = held if self._tier.is_locked(index) else {}
        self._locked.append([(tensor, sent[name]) for name, tensor in locked.items()])
        through = {name: tensor for name, tensor in sent.items() if name not in locked}
        self._work.append(pieces(self._reads(layer, through), self._reads(layer, held), self._ring_size.piece))

    def _complete(self, index: int) -> None:
        self._upload.complete(self._slot[index])

    def _bring(self, index: int, parts: Sequence[Part], known: bool) -> None:
        """Fills a pinned piece from the files, or with what the tier has (`known`), and sends it to the slot."""
        piece = self._upload.take()
        try:
            each = [(part, piece.memory.take(part.shape, part.dtype, part.info.begin % PAGE)) for part in parts]
            held = [(part.ram, here) for part, here in each if part.ram is not None]
            if known:
                self._copy(held)
            if wanted := {part.info: here for part, here in each if not known or part.ram is None}:
                self._reader.read(wanted)
            piece.sent = self._upload.send([(here, part.target) for part, here in each], self._slot[index])
            if held and not known and self._admits(index):
                self._copy([(here, ram) for ram, here in held])
        finally:
            self._upload.give(piece)

    def _upload_locked(self, index: int) -> None:
        """Sends what the tier has page-locked to the slot."""
        self._upload.send(self._locked[index], self._slot[index])

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Within RAM, (from, to). By numpy: torch would set all cores to work for each of the threads."""
        start = time.perf_counter()
        for source, target in copies:
            np.copyto(as_bytes(target).numpy(), as_bytes(source).numpy())
        self._reader.clock.add("host_copy", time.perf_counter() - start)

    def _admits(self, index: int) -> bool:
        """Whether the tier holds the layer; asked once for all of its pieces."""
        with self._lock:
            if index not in self._admitted:
                self._admitted[index] = self._tier.admits(index)
            return self._admitted[index]


def _passing(layer: Layer, resident: ResidentLayer) -> list[str]:
    """The tensors that every prompt reads again, since they do not stay as they are read."""
    blocks = zip(layer.blocks, resident.kept, strict=True)
    changes = resident.precision.kept or resident.moves
    names = [name for block, kept in blocks if kept < block.neurons or changes for name in block.rows]
    return names + (list(layer.matrices) if resident.precision.others else [])
