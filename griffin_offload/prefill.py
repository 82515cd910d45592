"""The sweep: one pass of the prompt over the layers, which reads each once and leaves its experts behind.

For every decoder layer, in order: wait until it is read ► forward ► statistic ► select ► materialise ► release.
This is the only place that knows the order.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor

from .errors import NumericError
from .hooks import ObserveNeurons, StreamLayer
from .materialize import gather
from .memory import steady_heap
from .plan import STAGING_LAYERS
from .selection import select_experts
from .skeleton import Layer, Skeleton
from .weights.arena import Arena
from .weights.prefetch import Prefetch
from .weights.reader import Reader

OnLayer = Callable[[int, int], None]


@dataclass
class ResidentLayer:
    """What stays of one layer: its tensors by name, those of the neurons with only the kept ones.

    `statistic` (F,), float32, and `experts` (k,), int64, are the prompt's once the layer has passed, if it is pruned.
    They are taken beforehand: small blocks that stay, taken between activations, would tear the heap into holes.
    `complete` says that the tensors have been filled, so that another prompt need only read the neurons again."""

    tensors: dict[str, Tensor]
    kept: int
    statistic: Tensor
    experts: Tensor
    complete: bool = False


def resident_layers(skeleton: Skeleton, kept: Sequence[int], device: str) -> list[ResidentLayer]:
    """Memory for every layer with kept[i] neurons, on the device; nothing is read yet."""
    sizes = skeleton.sizes()
    arena = Arena(sizes.resident(tuple(kept)) - sizes.outside, device)
    return [_take_layer(skeleton, layer, k, arena, arena) for layer, k in zip(skeleton.layers, kept, strict=True)]


def passing_layers(skeleton: Skeleton, kept: Sequence[int]) -> list[ResidentLayer]:
    """Memory that layers pass through, each to be used up before the next: for an export. On the CPU."""
    sizes = skeleton.sizes().layers
    fixed = [Arena(max(layer.fixed for layer in sizes)) for _ in range(STAGING_LAYERS)]
    size = max(layer.feed_forward(k) for layer, k in zip(sizes, kept, strict=True))
    whole = any(k == layer.neurons for layer, k in zip(sizes, kept, strict=True))  # then the reader writes to it
    compact = [Arena(size) for _ in range(STAGING_LAYERS if whole else 1)]
    layers = []
    for index, (layer, k) in enumerate(zip(skeleton.layers, kept, strict=True)):
        ring = fixed[index % STAGING_LAYERS]
        ring.rewind()
        neurons = compact[index % len(compact)]
        neurons.rewind()
        layers.append(_take_layer(skeleton, layer, k, ring, neurons))
    return layers


def _take_layer(skeleton: Skeleton, layer: Layer, kept: int, fixed: Arena, neurons: Arena) -> ResidentLayer:
    tensors = {
        name: (fixed if name in layer.fixed else neurons).take(shape, skeleton.dtype)
        for name, shape in skeleton.kept_shapes(layer, kept).items()
    }
    device = tensors[layer.down].device
    statistic = torch.zeros(layer.neurons, dtype=torch.float32, device=device)
    return ResidentLayer(tensors, kept, statistic, torch.arange(kept, device=device))


@dataclass
class _Staged:
    """One layer on its way: `read`, where the reader writes (CPU), and `dense`, what the prompt's forward uses."""

    read: dict[str, Tensor]
    dense: dict[str, Tensor]


class Sweep:
    """Arms a skeleton's layers; the next forward of the model is the sweep. Use as a context manager.

    Raises, from within that forward, NumericError for NaN or infinite activations and what the reader raises.
    When the last layer has passed, hooks and staging are gone and the model is resident.
    `on_finished(i)` is called while layer i is whole in its resident memory, before the next layer runs.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        reader: Reader,
        layers: Sequence[ResidentLayer],
        *,
        copies: bool,
        steady: bool,
        on_layer: OnLayer | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> None:
        self.started = False
        self._skeleton, self._layers = skeleton, layers
        self._on_layer, self._on_finished = on_layer, on_finished
        self._staged = self._stage(copies)
        self._steady = steady
        reads = [
            {skeleton.tensors[layer.prefix + name]: tensor for name, tensor in staged.read.items()}
            for layer, staged in zip(skeleton.layers, self._staged, strict=True)
        ]
        self._prefetch = Prefetch(reader, reads, STAGING_LAYERS)
        self._heap = ExitStack()
        self._observer: ObserveNeurons | None = None

    def __enter__(self) -> "Sweep":
        try:
            if self._steady:
                self._heap.enter_context(steady_heap())
            self._prefetch.__enter__()
            for index, layer in enumerate(self._skeleton.layers):
                add_hook_to_module(layer.module, StreamLayer(self, index))
            self._tell(0)
        except BaseException:  # Ctrl-C: nobody calls __exit__ of what was not entered
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks, stop the reader, let the staging go. Harmless when the sweep is done."""
        self._prefetch.close()
        if self._observer:
            self._observer.remove()
            self._observer = None
        for layer, resident in zip(self._skeleton.layers, self._layers, strict=True):
            remove_hook_from_module(layer.module)
            self._assign(layer, resident.tensors)
        self._staged = []
        self._heap.close()

    def onload(self, index: int) -> None:
        """Before a layer's forward: its weights in place, its statistic observed."""
        self.started = True
        layer, resident, staged = self._skeleton.layers[index], self._layers[index], self._staged[index]
        self._prefetch.wait(index)
        for name, tensor in staged.dense.items():
            if tensor is not staged.read[name]:
                tensor.copy_(staged.read[name])
        self._assign(layer, resident.tensors | staged.dense)
        if resident.kept < layer.neurons:
            down = layer.module.get_submodule(self._skeleton.entry.down)
            self._observer = ObserveNeurons(down, resident.statistic.zero_())

    def finish(self, index: int, hidden: Tensor) -> None:
        """After a layer's forward: its experts chosen and gathered, its buffers given back."""
        layer, resident, staged = self._skeleton.layers[index], self._layers[index], self._staged[index]
        if not torch.isfinite(hidden).all():
            raise NumericError(_what_is_not_finite(self._skeleton, layer, staged.dense))
        if self._observer:
            self._observer.remove()
            self._observer = None
            resident.experts.copy_(select_experts(resident.statistic, resident.kept))
            for name in layer.neuron_tensors:
                gather(staged.dense[name], resident.experts, layer.neuron_axis(name), resident.tensors[name])
            self._assign(layer, resident.tensors)
        if self._on_finished:
            self._on_finished(index)
        resident.complete = True
        self._prefetch.release()
        if index + 1 == len(self._layers):
            self.close()
        self._tell(index + 1)

    def _stage(self, copies: bool) -> list[_Staged]:
        """Buffers for what is read. Kept whole and on the CPU, a tensor is read straight to where it stays.

        `copies`: the forward's tensors are not where the reader can write (a GPU), so that each is copied there."""
        sizes = self._skeleton.sizes().layers
        device = next(iter(self._layers[0].tensors.values())).device.type
        pruned = any(layer.kept < size.neurons for layer, size in zip(self._layers, sizes, strict=True))
        dense_size = max(size.feed_forward(size.neurons) for size in sizes) if pruned else 0
        whole = max(size.fixed + size.feed_forward(size.neurons) for size in sizes)
        dense_ring = [Arena(dense_size, device) for _ in range(1 if copies else STAGING_LAYERS)]
        host_ring = [Arena(whole) for _ in range(STAGING_LAYERS)] if copies else []
        staged = []
        for index, (layer, resident) in enumerate(zip(self._skeleton.layers, self._layers, strict=True)):
            dense_arena = dense_ring[index % len(dense_ring)]
            dense_arena.rewind()
            dense = {} if resident.complete else {name: resident.tensors[name] for name in layer.fixed}
            for name in layer.neuron_tensors:
                if resident.kept < layer.neurons:
                    dense[name] = dense_arena.take(self._skeleton.shapes[layer.prefix + name], self._skeleton.dtype)
                elif not resident.complete:
                    dense[name] = resident.tensors[name]
            read = dense
            if copies:
                host = host_ring[index % STAGING_LAYERS]
                host.rewind()
                read = {name: host.take(tensor.shape, tensor.dtype) for name, tensor in dense.items()}
            staged.append(_Staged(read, dense))
        return staged

    def _assign(self, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._skeleton.assign(layer.prefix + name, tensor)

    def _tell(self, done: int) -> None:
        if self._on_layer:
            self._on_layer(done, len(self._layers))


def load_outside(skeleton: Skeleton, reader: Reader, device: str) -> None:
    """Read embeddings, final norm and head to the device. Raises NumericError for NaN or infinite weights."""
    arena = Arena(skeleton.sizes().outside)
    tensors = {name: arena.take(skeleton.shapes[name], skeleton.dtype) for name in skeleton.outside}
    reader.read({skeleton.tensors[name]: tensor for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        _check_finite(skeleton, name, tensor)
        skeleton.assign(name, tensor.to(device))


def _check_finite(skeleton: Skeleton, name: str, tensor: Tensor) -> None:
    for piece in tensor.view(-1).split(2**18):
        if not torch.isfinite(piece).all():
            way_out = "; try --dtype bfloat16 or float32" if skeleton.dtype == torch.float16 else ""
            raise NumericError(f"{skeleton.tensors[name].file}: {name} holds NaN or infinite weights{way_out}")


def _what_is_not_finite(skeleton: Skeleton, layer: Layer, dense: Mapping[str, Tensor]) -> str:
    try:
        for name, tensor in dense.items():
            _check_finite(skeleton, layer.prefix + name, tensor)
    except NumericError as error:
        return str(error)
    way_out = "" if skeleton.dtype == torch.float32 else f" in {skeleton.dtype}; try --dtype float32"
    return f"the activations of {layer.prefix.rstrip('.')} are NaN or infinite{way_out}"
