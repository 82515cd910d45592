"""A model without weights: transformers' own modules on `meta`, and which parameter is read from which tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .architecture import FeedForward, feed_forward
from .cache import windows
from .errors import CheckpointError, UnsupportedArchitecture
from .plan import LayerSizes, ModelSizes
from .weights.arena import padded
from .weights.checkpoint import Checkpoint, TensorInfo


@dataclass(frozen=True)
class Layer:
    """One decoder layer: parameter names relative to it. `up` has neurons as rows (dim 0), `down` as columns."""

    module: nn.Module
    prefix: str
    up: tuple[str, ...]
    down: str
    fixed: tuple[str, ...]
    neurons: int

    @property
    def neuron_tensors(self) -> tuple[str, ...]:
        return (*self.up, self.down)

    def neuron_axis(self, name: str) -> int:
        return 1 if name == self.down else 0


class Skeleton:
    """A model on meta, cut into decoder layers and what is outside them."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        """Raises UnsupportedArchitecture for a model type without an entry in `architecture.py`."""
        self.config, self.dtype = config, dtype
        self.entry: FeedForward = feed_forward(config.model_type)
        if getattr(config, "quantization_config", None):
            raise UnsupportedArchitecture(
                "the checkpoint is quantised (quantization_config in config.json); use the original weights"
            )
        with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are small and computed
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        # The last token's slice of a prompt has strides that make torch's CPU product copy the whole head's weight.
        self.model.get_output_embeddings().register_forward_pre_hook(_compact_input)
        self.layers = [self._layer(i, m) for i, m in enumerate(self.model.get_submodule(self.entry.layers))]
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self.tensors: Mapping[str, TensorInfo] = {}
        self.aliases: Mapping[str, str] = self.tied

    def to_device(self, device: str) -> None:
        """Move the buffers; parameters go there one by one as they are assigned."""
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def bind(self, checkpoint: Checkpoint) -> None:
        """Find every parameter's tensor. Raises CheckpointError for what is missing or does not fit."""
        persistent = self.model.state_dict().keys() - self.shapes.keys()
        if persistent:
            raise UnsupportedArchitecture(
                f"{self.config.model_type} keeps buffers in its checkpoint: {min(persistent)}"
            )
        matched = checkpoint.match(self.shapes, self.tied, self.model.base_model_prefix)
        self.tensors, self.aliases = matched.tensors, matched.aliases

    @property
    def inside(self) -> list[str]:
        """Parameters of the decoder layers."""
        return [layer.prefix + name for layer in self.layers for name in (*layer.fixed, *layer.neuron_tensors)]

    @property
    def outside(self) -> list[str]:
        """Parameters outside the decoder layers that have memory of their own."""
        inside = set(self.inside)
        return [name for name in self.shapes if name not in self.aliases and name not in inside]

    def assign(self, name: str, tensor: Tensor) -> None:
        """Make `tensor` the parameter `name`, and those tied to it."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner in (name, *(alias for alias, source in self.aliases.items() if source == name)):
            path, _, attribute = owner.rpartition(".")
            self.model.get_submodule(path).register_parameter(attribute, parameter)

    def kept_shapes(self, layer: Layer, kept: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's parameters when `kept` of its neurons stay."""
        shapes = {name: self.shapes[layer.prefix + name] for name in layer.fixed}
        for name in layer.neuron_tensors:
            axis = layer.neuron_axis(name)
            shape = self.shapes[layer.prefix + name]
            shapes[name] = (*shape[:axis], kept, *shape[axis + 1 :])
        return shapes

    def unload(self, names: Iterable[str] | None = None) -> None:
        """Parameters (all, if none are named) back to meta, so that the memory behind them may go."""
        for name in self.shapes if names is None else names:
            if name not in self.aliases:
                self.assign(name, torch.empty(self.shapes[name], dtype=self.dtype, device="meta"))

    def sizes(self) -> ModelSizes:
        """Bytes of everything, for the plan: from shapes alone."""
        item = self.dtype.itemsize
        table = self._name_of(self.model.get_input_embeddings().weight)
        head = self._name_of(self.model.get_output_embeddings().weight)
        tied = self.aliases.get(head) == table or self.aliases.get(table) == head
        return ModelSizes(
            outside=sum(padded(_count(self.shapes[name]) * item) for name in self.outside),
            lookup=0 if tied else _count(self.shapes[table]) * item,
            layers=tuple(self._layer_sizes(layer) for layer in self.layers),
            item=item,
            hidden=self.config.hidden_size,
            vocabulary=self.config.vocab_size,
            heads=self.config.num_attention_heads * _head_size(self.config),
            cache_per_token=tuple(self._cache_row() for _ in self.layers),
            windows=windows(self.config),
            context=self.config.max_position_embeddings,
        )

    def _layer(self, index: int, module: nn.Module) -> Layer:
        ups = {f"{path}.{p}" for path in self.entry.up for p, _ in module.get_submodule(path).named_parameters()}
        down = f"{self.entry.down}.weight"
        names = [name for name, _ in module.named_parameters()]
        fixed = tuple(name for name in names if name not in ups and name != down)
        up = tuple(name for name in names if name in ups)
        neurons = int(module.get_parameter(down).shape[1])
        return Layer(module, f"{self.entry.layers}.{index}.", up, down, fixed, neurons)

    def _layer_sizes(self, layer: Layer) -> LayerSizes:
        def size(name: str) -> int:
            return _count(self.shapes[layer.prefix + name]) * self.dtype.itemsize

        return LayerSizes(
            fixed=sum(padded(size(name)) for name in layer.fixed),
            neurons=layer.neurons,
            per_neuron=tuple(size(name) // layer.neurons for name in layer.neuron_tensors),
        )

    def _name_of(self, parameter: Tensor) -> str:
        return str(next(n for n, p in self.model.named_parameters(remove_duplicate=False) if p is parameter))

    def _cache_row(self) -> int:
        """Bytes of keys and values that one token leaves in one layer."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return 2 * int(heads) * _head_size(self.config) * self.dtype.itemsize


def _compact_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most bytes of a checkpoint have. Raises CheckpointError where it is not a float that runs."""
    bytes_by_dtype: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.bytes
    if not bytes_by_dtype:
        raise CheckpointError(f"{checkpoint.folder} holds no tensors")
    dtype = max(bytes_by_dtype, key=lambda d: bytes_by_dtype[d])
    return torch.float32 if dtype == torch.float64 else dtype


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
