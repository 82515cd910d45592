"""A model without weights: transformers' own modules on `meta`, and which parameter is read from which tensor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from ..checkpoint.conversion import pieces
from ..checkpoint.headers import Checkpoint, Piece, TensorInfo
from ..checkpoint.reader import Reader
from ..errors import CheckpointError, NumericError, UnsupportedArchitecture
from ..memory.arena import PAGE
from ..quant.weight import LEAST, Weight, dense_matrix, linear_module
from .architecture import Architecture, Experts, FeedForward, architecture
from .attention import use_pieces
from .decode_kernels import decode_by_own_kernels
from .detect import find_structure
from .layout import Block, Layer, NeuronRows
from .modules import LookedUp, Pieces, Projection, RoutedExperts


class Skeleton:
    """A model on meta, cut into decoder layers and what is outside them."""

    def __init__(self, config: Any, dtype: torch.dtype, entry: Architecture | None = None) -> None:
        """`entry`: default the model type's, or what its structure says; then it wants a probe.

        Raises UnsupportedArchitecture for a type that is refused, or whose layers are not found."""
        self.config, self.dtype = config, dtype
        listed = entry or architecture(config.model_type)
        if not listed and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            inside = getattr(getattr(config, "text_config", None), "model_type", None)
            why = f"a multimodal wrapper: the text model inside is {inside!r}" if inside else "it writes no text alone"
            raise UnsupportedArchitecture(f"model type {config.model_type!r} is not supported: {why}")
        with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are small and computed
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if listed:  # of an unknown type nobody knows what it does with a mask
            use_pieces(self.model)
        self.entry = listed or find_structure(self.model)
        # The last token's slice of a prompt has strides that make torch's CPU product copy the whole head's weight.
        self.model.get_output_embeddings().register_forward_pre_hook(_compact_input)
        self.layers = [self._layer(i, m) for i, m in enumerate(self.model.get_submodule(self.entry.layers))]
        decode_by_own_kernels(self.model, self.layers[0].module)
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.buffers = {name: b for name, b in self.model.state_dict().items() if name not in self.shapes}
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self.table_name = self._weight_of(self.model.get_input_embeddings())
        self.head_name = self._weight_of(self.model.get_output_embeddings())
        self.pieces: Mapping[str, Sequence[Piece]] = {}
        self.table: str | None = None  # what `leave_table` left in its file
        self._looked_up: LookedUp | None = None
        self.aliases: Mapping[str, str] = self.tied

    @property
    def packed(self) -> list[Tensor]:
        """What a token reads of packed weights."""
        forwards = (getattr(module, "forward", None) for module in self.model.modules())
        weights = [f.packed for f in forwards if isinstance(f, Projection) and f.packed is not None]
        weights += [w for f in forwards if isinstance(f, RoutedExperts) for each in f.packed.values() for w in each]
        return [tensor for weight in weights for tensor in weight.tensors]

    def to_device(self, device: str) -> None:
        """Move the buffers; parameters go there one by one as they are assigned."""
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def bind(self, checkpoint: Checkpoint) -> None:
        """Find every parameter's tensors. Raises CheckpointError for what is missing or does not fit."""
        needed = self.shapes | {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
        matched = checkpoint.match(needed, self.tied, pieces(self.model, checkpoint, needed))
        self.pieces, self.aliases = matched.pieces, matched.aliases

    def reads(self, tensors: Mapping[str, Tensor]) -> dict[TensorInfo, Tensor]:
        """Where the files' tensors go to fill parameters (or buffers), given by name."""
        return {
            piece.info: tensor[piece.place] if piece.place else tensor
            for name, tensor in tensors.items()
            for piece in self.pieces[name]
        }

    def phase(self, name: str) -> int | None:
        """Where a parameter begins within a page of its file; None where it is read in several pieces or bound to none.

        Memory at this phase can be read to directly, unless the tensor is encoded."""
        pieces = self.pieces.get(name, ())
        read_as_it_is = len(pieces) == 1 and not pieces[0].place and not pieces[0].info.encoding
        return pieces[0].info.begin % PAGE if read_as_it_is else None

    @property
    def block_layers(self) -> list[int]:
        """The layers that have a feed-forward block: block number -> layer."""
        return [index for index, layer in enumerate(self.layers) if layer.blocks]

    @property
    def inside(self) -> list[str]:
        """Parameters of the decoder layers."""
        return [layer.prefix + name for layer in self.layers for name in (*layer.fixed, *layer.neuron_tensors)]

    def leave_table(self, reader: Reader) -> None:
        """Leave the embedding table in its file, if it is not the head too: a token needs one row of it, which `reader`
        reads. A head that is packed then leaves its table there as well. Without effect where it cannot be read row by
        row. To be called after `bind`."""
        module: Any = self.model.get_input_embeddings()
        name = self.table_name
        pieces = self.pieces.get(self.aliases.get(name, name), ())
        rows_lie_whole = len(pieces) == 1 and not pieces[0].place
        if isinstance(module, nn.Embedding) and rows_lie_whole:
            info = pieces[0].info

            def read(rows: list[int]) -> Tensor:
                found = reader.read_rows(info, rows, self.dtype)
                if not torch.isfinite(found).all():
                    raise NumericError(f"{info.file}: {name} holds NaN or infinite weights")
                return found

            self._looked_up, self._embed = LookedUp(module, read), module.forward
            if name not in self.aliases and name not in self.aliases.values():
                self.table = name
                self._look_up(module)

    def _look_up(self, module: Any) -> None:
        module.padding_idx = None  # for training; it need not be among the rows
        module.forward = self._looked_up

    @property
    def head(self) -> str | None:
        """The head's name if it can be packed: a linear module, of one tensor in a file that can keep the table."""
        name = self.head_name
        pieces = self.pieces.get(self.aliases.get(name, name), ())
        whole = len(pieces) == 1 and not pieces[0].place
        fits = self._looked_up is not None and linear_module(self.model, name) is not None
        return name if fits and whole else None

    def pack_head(self, weight: Weight | None) -> None:
        """The head becomes this weight, and the table its file's; None: what it was is to be assigned again."""
        table: Any = self.model.get_input_embeddings()
        if weight is None:
            if not self.table and self._looked_up is not None:
                table.forward = self._embed
            return
        self._look_up(table)
        device = weight.tensors[0].device
        empty = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=device)
        table.register_parameter("weight", nn.Parameter(empty, requires_grad=False))
        assert self.head
        self._pack(self.head, weight)

    @property
    def outer(self) -> list[str]:
        """Parameters outside the decoder layers that have memory of their own."""
        inside = set(self.inside)
        return [name for name in self.shapes if name not in self.aliases and name not in inside]

    def assign(self, name: str, value: "Tensor | Weight | Sequence[Weight]") -> None:
        """Make `value` the parameter `name`, and those tied to it; packed: what its module multiplies by.

        Several weights: one for each routed expert."""
        if not isinstance(value, Tensor):
            self._pack(name, value)
            return
        parameter = nn.Parameter(value, requires_grad=False)
        for owner in (name, *(alias for alias, source in self.aliases.items() if source == name)):
            path, _, attribute = owner.rpartition(".")
            module = self.model.get_submodule(path)
            module.register_parameter(attribute, parameter)
            if isinstance(module.forward, Projection) and attribute == "weight":
                module.forward.packed = None
            elif isinstance(module.forward, RoutedExperts):
                module.forward.packed.pop(attribute, None)

    def _pack(self, name: str, value: "Weight | Sequence[Weight]") -> None:
        path, _, attribute = name.rpartition(".")
        module: Any = self.model.get_submodule(path)
        if isinstance(value, Sequence):
            module.forward.packed[attribute] = value
        else:
            if not isinstance(module.forward, Projection):
                module.forward = Projection(module)
            module.forward.packed = value
        shape = getattr(module, attribute).shape
        # Of no row, so that nobody multiplies by it unnoticed.
        empty = torch.empty(0, *shape[1:], dtype=self.dtype, device=_device(value))
        module.register_parameter(attribute, nn.Parameter(empty, requires_grad=False))

    def kept_shapes(self, layer: Layer, kept: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's parameters when kept[b] of the neurons of its block b stay."""
        shapes = {name: self.shapes[layer.prefix + name] for name in layer.fixed}
        for block, k in zip(layer.blocks, kept, strict=True):
            for name, rows in block.rows.items():
                shape = list(self.shapes[layer.prefix + name])
                shape[rows.axis + bool(block.routed)] = 2 * k if rows.halves else k
                shapes[name] = tuple(shape)
        return shapes

    def pieces_of(self, layer: Layer, block: Block) -> Pieces | None:
        """What cuts a long prompt into pieces around a block; None where the layer has no module for that."""
        owner, _, rest = block.path.partition(".")
        module: Any = layer.module.get_submodule(owner)
        return module.forward if rest else None

    def unload(self, names: Iterable[str] | None = None) -> None:
        """Parameters (all, if none are named) back to meta, so that the memory behind them may go."""
        for name in self.shapes if names is None else names:
            if name not in self.aliases:
                self.assign(name, torch.empty(self.shapes[name], dtype=self.dtype, device="meta"))

    def _layer(self, index: int, module: nn.Module) -> Layer:
        found = [(_find_block(module, block), size) for block, size in self.entry.blocks.items()]
        blocks = tuple(replace(block, size=size) for block, size in found if block)
        in_blocks = {name for block in blocks for name in block.rows}
        fixed = tuple(name for name, _ in module.named_parameters() if name not in in_blocks)
        for owner in {block.path.split(".")[0] for block in blocks if "." in block.path}:
            feed_forward = module.get_submodule(owner)
            feed_forward.forward = Pieces(feed_forward.forward)
        matrices = {name: shape for name in fixed if (shape := _matrix(module, name))}
        return Layer(module, f"{self.entry.layers}.{index}.", blocks, fixed, matrices)

    def _weight_of(self, owner: nn.Module) -> str:
        return f"{next(name for name, module in self.model.named_modules() if module is owner)}.weight"


def _matrix(layer: nn.Module, name: str) -> tuple[int, int] | None:
    """NeuronRows and columns of a parameter that can be packed, and is large enough to be worth it."""
    module = linear_module(layer, name)
    if module is None or min(module.weight.shape) < LEAST:
        return None
    rows, columns = dense_matrix(module, module.weight).shape
    return int(rows), int(columns)


def _find_block(layer: nn.Module, block: FeedForward | Experts) -> Block | None:
    """The block of a layer, if it has it."""
    try:
        if isinstance(block, Experts):
            return _routed(layer.get_submodule(block.path), block.path)
        down: Any = layer.get_submodule(block.down)
        ups = {path: layer.get_submodule(path) for path in block.up}
    except AttributeError:
        return None
    flipped = isinstance(down, Conv1D)  # GPT-2's: its weight is (in, out)
    neurons = int(down.weight.shape[0 if flipped else 1])
    if flipped:
        for module in (down, *ups.values()):
            module.forward = partial(_convolve, module)
    rows = {}
    for path, module in ups.items():
        for name, parameter in module.named_parameters():
            axis = 1 if flipped and parameter.ndim == 2 else 0
            rows[f"{path}.{name}"] = NeuronRows(axis, neurons, block.halves)
    name = f"{block.down}.weight"
    rows[name] = NeuronRows(0 if flipped else 1, neurons)
    return Block(block.down, neurons, 0, rows, name)


def _convolve(module: Conv1D, states: Tensor) -> Tensor:
    """Conv1D's product for any number of neurons; its own forward shapes the output by a number that it keeps."""
    return linear(states, module.weight.T, module.bias)


def _routed(module: Any, path: str) -> Block:
    """Routed experts: gate_up_proj (E, 2F, D) or up_proj (E, F, D), and down_proj (E, D, F); or each transposed."""
    names = dict(module.named_parameters())
    if not hasattr(module, "is_concatenated") or "down_proj" not in names or module.has_post_expert_norm:
        raise UnsupportedArchitecture(f"{type(module).__name__} holds its routed experts in a form that is not known")
    module.forward = RoutedExperts(module)
    routed, _, _ = names["down_proj"].shape
    neurons = int(names["down_proj"].shape[1 if module.is_transposed else 2])
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = {}
    for name in (up, f"{up}_bias", "down_proj"):
        if name in names:
            across = name != "down_proj" and module.is_transposed and names[name].ndim == 3
            axis = int(not module.is_transposed) if name == "down_proj" else int(across)
            halves = name != "down_proj" and module.has_gate
            rows[f"{path}.{name}"] = NeuronRows(axis, neurons, halves, halves and not module.is_concatenated)
    return Block(path, neurons, int(routed), rows, f"{path}.down_proj")


def _compact_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most bytes of a checkpoint have; bfloat16 where some are quantised blocks.

    Raises CheckpointError where there are none."""
    if any(info.encoding and info.dtype == torch.bfloat16 for info in checkpoint.tensors.values()):
        return torch.bfloat16
    bytes_by_dtype: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.bytes
    if not bytes_by_dtype:
        raise CheckpointError(f"{checkpoint.folder} holds no tensors")
    dtype = max(bytes_by_dtype, key=lambda d: bytes_by_dtype[d])
    return torch.float32 if dtype == torch.float64 else dtype


def _device(value: "Weight | Sequence[Weight]") -> torch.device:
    first = value[0] if isinstance(value, Sequence) else value
    return first.tensors[0].device


def count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
