"""Streams decoder layers: prefetch from disk, onload for the forward, keep the compact weights, free the buffers."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor

from ..checkpoint.reader import Reader
from ..errors import NumericError
from ..memory.heap import steady_heap
from ..memory.host_cache import HostTier
from ..memory.upload import ring_for
from ..model.hooks import LayerDriver, StreamLayer
from ..model.layout import Layer, ModelLayout
from ..model.skeleton import Skeleton
from ..options import OnLayer
from ..planning.rows import STAGING_LAYERS
from ..quant.weight import Stored, dense_matrix, linear_module
from .gather import Resident
from .prefetch import Prefetch
from .resident_layer import ResidentLayer
from .staging import CpuStaging, UploadStaging


class LayerStream:
    """The layers of a model, one at a time and in order: `onload(i)`, then `release(i)`.

    `open` makes a driver hear of every layer's forward; `close` undoes all of it. Raises what the reader raises.
    One that `stays` can be opened again afterwards, and keeps its buffers until `free`."""

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
        stays: bool = False,
    ) -> None:
        """`copies`: the device is not where the reader writes. `steady`: the heap keeps what activations free.
        `tier`: layers that stay in RAM for the next stream. `on_layer(done, total)` hears of the progress."""
        self._skeleton, self._layers, self._on_layer = skeleton, layers, on_layer
        self._tier, self._steady, self._stays = tier or HostTier(), steady, stays
        inputs = (skeleton.layout, layers, self._tier, reader)
        ring = ring_for(layers[0].device, skeleton.layout.converts) if copies else None
        staging = UploadStaging(*inputs, ring) if ring else CpuStaging(*inputs)
        self._clock, self._threads = reader.clock, ring.threads if ring else 1
        self._prefetch: Prefetch | None = None  # None: not open
        self._staging: CpuStaging | None = staging  # None: all layers have passed
        self._finite: list[tuple[int, Tensor]] = []
        self._heap = ExitStack()
        self._there = self._waited = 0.0  # when the layer at hand was there, and how long it was waited for

    def __len__(self) -> int:
        return len(self._layers)

    def open(self, driver: LayerDriver) -> None:
        try:
            if self._steady:
                self._heap.enter_context(steady_heap())
            assert self._staging
            self._clock.start(self._threads)
            self._prefetch = Prefetch(self._staging.loads(), STAGING_LAYERS, self._threads).__enter__()
            for index, module in enumerate(self._skeleton.modules):
                add_hook_to_module(module, StreamLayer(driver, index, self._skeleton.threads))
            self._tell(0)
        except BaseException:  # Ctrl-C: nobody closes what was not opened
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks, stop the readers, free the staging. Harmless when all layers have passed."""
        self._stop()
        for module, layer, resident in zip(self._skeleton.modules, self._skeleton.layers, self._layers, strict=True):
            remove_hook_from_module(module)
            self.assign(layer, resident.tensors)

    def _stop(self) -> None:
        if self._prefetch:
            self._prefetch.close()
            self._prefetch = None
        self._clock.stop()
        self._skeleton.threads.back()
        if not self._stays:
            self.free()
        for layer in self._layers:
            layer.scratch.free()
        self.settle()

    def free(self) -> None:
        """Give the buffers back: no layer passes any more."""
        if self._staging:
            self._staging.close()
        self._staging = None

    def settle(self) -> None:
        """From here on, what is freed goes back to the system (see memory.heap.steady_heap)."""
        self._heap.close()

    def onload(self, index: int) -> dict[str, Tensor]:
        """A layer's weights in place. Returns its dense tensors by name."""
        assert self._staging
        assert self._prefetch
        start = time.perf_counter()
        self._prefetch.wait(index)
        self._there = time.perf_counter()
        self._waited = self._there - start
        self._clock.add("wait", self._waited)
        self._tier.was_read(index)
        self._staging.arrive(index)
        dense = self._staging.dense[index]
        self.assign(self._skeleton.layers[index], self._layers[index].tensors | dense)
        return dense

    def release(self, index: int) -> None:
        """After a layer's forward: its compact weights in place, its buffers given back."""
        assert self._staging
        assert self._prefetch
        layer, resident, dense = self._skeleton.layers[index], self._layers[index], self._staging.dense[index]
        for name in layer.matrices:
            weight = resident.tensors[name]
            if not isinstance(weight, Tensor) and not resident.complete:
                matrix = dense_matrix(linear_module(self._skeleton.modules[index], name), dense[name])
                cast("Stored", weight).fill(lambda begin, end, _: matrix[begin:end], resident.scratch)  # noqa: B023
        self.assign(layer, resident.tensors)
        resident.complete = True
        self._staging.leave(index)
        self._prefetch.release()
        self._clock.layer(self._waited, time.perf_counter() - self._there)
        if index + 1 == len(self._layers):
            self._stop()
        self._tell(index + 1)

    def check(self, index: int, states: Tensor) -> None:
        """Raises NumericError for NaN or infinite states that leave layer `index`; on a GPU, which nobody waits for on
        the way, with the last layer."""
        self._finite.append((index, torch.isfinite(states).all()))
        if states.device.type != "cpu" and index + 1 < len(self._layers):
            return
        for number, finite in self._finite:
            if not finite:
                dense = self._staging.dense[index] if self._staging and number == index else {}
                raise NumericError(_not_finite(self._skeleton.layout, self._skeleton.layers[number], dense))
        self._finite = []

    def assign(self, layer: Layer, tensors: Mapping[str, Resident]) -> None:
        for name, tensor in tensors.items():
            self._skeleton.slots.assign(layer.prefix + name, tensor)

    def _tell(self, done: int) -> None:
        if self._on_layer:
            self._on_layer(done, len(self._layers))


def check_finite(layout: ModelLayout, name: str, tensor: Tensor) -> None:
    """Raises NumericError for NaN or infinite weights."""
    for piece in tensor.view(-1).split(2**22):
        # A sum is many times as fast as a look at each, and finite only if all are (of another dtype it would copy).
        if not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            way_out = "; try --dtype bfloat16 or float32" if layout.dtype == torch.float16 else ""
            raise NumericError(f"{layout.source(name)[0].info.file}: {name} holds NaN or infinite weights{way_out}")


def _not_finite(layout: ModelLayout, layer: Layer, dense: Mapping[str, Tensor]) -> str:
    """Which weights of a layer are not finite, or else its activations."""
    try:
        for name, tensor in dense.items():
            check_finite(layout, layer.prefix + name, tensor)
    except NumericError as error:
        return str(error)
    way_out = "" if layout.dtype == torch.float32 else f" in {layout.dtype}; try --dtype float32"
    return f"the activations of {layer.prefix.rstrip('.')} are NaN or infinite{way_out}"
