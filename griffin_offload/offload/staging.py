"""Where each layer is read to, and what of it is on the device while it runs.

On the CPU a tensor that is kept whole is read straight to where it stays, everything else into a ring of buffers. For a
GPU all of a layer passes through pinned host buffers (memory/upload.py)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..memory.arena import Arena
from ..memory.host_cache import HostTier
from ..memory.upload import Upload
from ..model.layout import Layer, ModelLayout
from ..planning.rows import STAGING_LAYERS
from ..planning.sizes import model_sizes
from .prefetch import Load
from .resident_layer import ResidentLayer, aligned_phase


class CpuStaging:
    """`dense[i]`: the tensors of layer i that its forward uses, by name; `loads[i]`: what brings them there."""

    def __init__(self, layout: ModelLayout, layers: Sequence[ResidentLayer], tier: HostTier) -> None:
        """`tier`: layers that stay in RAM for the next pass, where they are then found."""
        self._layout, self._tier = layout, tier
        self.upload: Upload | None = None
        self.dense: list[dict[str, Tensor]] = []
        self.loads: list[Load] = []
        self._make_buffers(layers)
        for index, (layer, resident) in enumerate(zip(layout.layers, layers, strict=True)):
            passing = _passing(layer, resident)
            own = {n: t for n, t in resident.tensors.items() if n not in passing and isinstance(t, Tensor)}
            self._stage(index, layer, {} if resident.complete else own, passing)

    def arrive(self, index: int) -> None:
        """Layer `index` has been read: its tensors are ready for what is computed from here on."""

    def leave(self, index: int) -> None:
        """Nothing computed from here on reads the layer's buffers."""

    def _make_buffers(self, layers: Sequence[ResidentLayer]) -> None:
        staged = model_sizes(self._layout).staged(tuple(layer.kept for layer in layers), layers[0].precision)
        self._ring = [Arena(staged) for _ in range(STAGING_LAYERS)]

    def _stage(self, index: int, layer: Layer, own: dict[str, Tensor], passing: Sequence[str]) -> None:
        held = self._held(index, layer, passing)
        dense = own | (held or self._allocate(self._ring[index % STAGING_LAYERS], layer, passing))
        self.dense.append(dense)
        self.loads.append(Load(self._reads(index, layer, dense, held)))

    def _held(self, index: int, layer: Layer, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of a layer that the tier holds, read already or not yet; {} where it holds none."""
        full = {name: layer.prefix + name for name in names}
        shapes = {name: self._layout.shapes[full[name]] for name in names}
        return self._tier.take(index, shapes, self._layout.dtype, {n: self._layout.phase(full[n]) for n in names})

    def _reads(self, index: int, layer: Layer, tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> Mapping:  # type: ignore[type-arg]
        """Where the files' tensors go, but for those that the tier has read before."""
        known = held if self._tier.is_read(index) else {}
        return self._layout.reads({layer.prefix + n: tensor for n, tensor in tensors.items() if n not in known})

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
    """The same for a device that the reader cannot write to: read to a host buffer, sent to a device buffer; what stays
    is copied from there, within the device."""

    def arrive(self, index: int) -> None:
        assert self.upload
        self.upload.arrive(index % STAGING_LAYERS)
        for name, tensor in self._sent[index].items():
            if tensor is not self.dense[index][name]:
                self.dense[index][name].copy_(tensor)

    def leave(self, index: int) -> None:
        assert self.upload
        self.upload.leave(index % STAGING_LAYERS)

    def _make_buffers(self, layers: Sequence[ResidentLayer]) -> None:
        sizes = model_sizes(self._layout).layers
        whole = max(size.fixed + size.feed_forward(size.whole) for size in sizes)
        self.upload = Upload(whole, STAGING_LAYERS, layers[0].device)
        self._sent: list[dict[str, Tensor]] = []

    def _stage(self, index: int, layer: Layer, own: dict[str, Tensor], passing: Sequence[str]) -> None:
        assert self.upload
        held, slot, names = self._held(index, layer, passing), index % STAGING_LAYERS, [*own, *passing]
        host, device = self.upload.host[slot], self.upload.there[slot]
        read, sent = (self._allocate(arena, layer, names, aligned=True) for arena in (host, device))
        self._sent.append(sent)
        self.dense.append(own | {name: sent[name] for name in passing})
        copies = [(tensor, read[name]) for name, tensor in held.items()]
        self.loads.append(Load(self._reads(index, layer, read | held, held), copies, host.used))


def _passing(layer: Layer, resident: ResidentLayer) -> list[str]:
    """The tensors that every prompt reads again, since they do not stay as they are read."""
    blocks = zip(layer.blocks, resident.kept, strict=True)
    changes = resident.precision.kept or resident.moves
    names = [name for block, kept in blocks if kept < block.neurons or changes for name in block.rows]
    return names + (list(layer.matrices) if resident.precision.others else [])
