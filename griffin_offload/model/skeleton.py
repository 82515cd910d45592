"""Builds transformers' model on `meta` and binds it to a checkpoint: modules, layout, and slots for the weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from ..checkpoint.conversion import pieces
from ..checkpoint.headers import Checkpoint, Packed
from ..checkpoint.reader import Reader
from ..errors import PromptError, UnsupportedArchitecture
from ..quant.weight import LEAST, dense_matrix, linear_module
from .architecture import Architecture, Experts, FeedForward, architecture
from .attention import in_pieces, use_pieces, writes_scores
from .attention_sizes import attention_sizes
from .compiled import CompiledLayers
from .decode_kernels import decode_by_own_kernels
from .detect import find_structure
from .hops import to_device
from .layout import Block, Layer, ModelLayout, NeuronRows
from .modules import Pieces, RoutedExperts, multiply
from .recurrent import follow_states
from .rotary import give_rows_their_own_length
from .threads import Threads
from .weight_slots import WeightSlots


class Skeleton:
    """A model without weights: `model` (transformers'), `modules` (its decoder layers), `layout` (the same as data),
    `slots` (which put weights into the modules) and `threads` (which a forward on the CPU gets)."""

    def __init__(self, config: Any, dtype: torch.dtype, entry: Architecture | None = None) -> None:
        """`entry`: default the model type's, or what its structure says; then it wants a probe.

        Raises UnsupportedArchitecture for a type that is refused, or whose layers are not found."""
        listed = entry or _listed(config)
        with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are small and computed
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if listed:  # of an unknown type nobody knows what it does with a mask
            use_pieces(self.model)
        give_rows_their_own_length(self.model)
        self.entry = listed or find_structure(self.model)
        # The last token's slice of a prompt has strides that make torch's CPU product copy the whole lm_head.
        self.model.get_output_embeddings().register_forward_pre_hook(_compact_input)
        self.modules: Sequence[nn.Module] = list(self.model.get_submodule(self.entry.layers))
        layers = tuple(_layer(self.entry, index, module) for index, module in enumerate(self.modules))
        self.threads = Threads(max(weights.shape[-2:].numel() for weights in self.modules[0].parameters()))
        decode_by_own_kernels(self.model, self.modules[0], self.threads)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        buffers = {name: b for name, b in self.model.state_dict().items() if name not in shapes}
        self.layout = ModelLayout(
            config=config,
            dtype=dtype,
            layers=layers,
            shapes=shapes,
            buffers={name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()},
            aliases=dict(self.model.all_tied_weights_keys),
            embedding=self._weight_of(self.model.get_input_embeddings()),
            lm_head=self._weight_of(self.model.get_output_embeddings()),
            in_chunks=in_pieces(self.model),
            writes_scores=writes_scores(self.model),
            attention=attention_sizes(self.modules, config),
            state_bytes=follow_states(self.modules, config, listed),
        )
        self.slots = WeightSlots(self.model, self.layout)
        self.model.get_input_embeddings().register_forward_pre_hook(partial(_check_tokens, rows=self.rows_of_table))

    @property
    def rows_of_table(self) -> int:
        """How many tokens the embedding has a row for."""
        return self.layout.shapes[self.layout.embedding][0]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.layout.layers

    @property
    def config(self) -> Any:
        return self.layout.config

    @cached_property
    def compiled(self) -> CompiledLayers:
        return CompiledLayers(self.modules)

    def bind(self, checkpoint: Checkpoint, rows: Reader | None = None) -> None:
        """Find every parameter's tensors in a checkpoint. With `rows`, the embedding stays in its file where it can be
        read row by row and is not the lm_head too: `rows` reads those of the tokens.

        Raises CheckpointError for what is missing or does not fit."""
        layout = self.layout
        needed = {**layout.shapes, **{name: shape for name, (shape, _) in layout.buffers.items()}}
        found = pieces(self.model, checkpoint, needed) if checkpoint.pieces is None else checkpoint.pieces
        matched = checkpoint.match(needed, layout.aliases, found)
        layout = replace(layout, pieces=matched.pieces, aliases=matched.aliases)
        self.layout = layout
        if rows and self._looks_up and _in_one_piece(layout, layout.embedding):
            self.layout = self._with_table_on_disk(_in_one_piece(layout, layout.lm_head))
            self.slots = WeightSlots(self.model, self.layout, rows)
        else:
            self.slots = WeightSlots(self.model, layout)

    @property
    def published_layout(self) -> ModelLayout:
        """The layout beside a checkpoint that has not been seen: one that holds embedding and lm_head as a tensor each,
        as published ones do."""
        return self._with_table_on_disk(head_in_one_piece=True) if self._looks_up else self.layout

    @property
    def _looks_up(self) -> bool:
        return isinstance(self.model.get_input_embeddings(), nn.Embedding)

    def _with_table_on_disk(self, head_in_one_piece: bool) -> ModelLayout:
        """The layout where rows of the embedding are read by themselves, unless it is the lm_head too."""
        layout = self.layout
        tied = layout.embedding in layout.aliases or layout.embedding in layout.aliases.values()
        linear_head = linear_module(self.model, layout.lm_head) is not None
        return replace(layout, embedding_on_disk=not tied, lm_head_alone=linear_head and head_in_one_piece)

    def to_device(self, device: str) -> None:
        """Move the buffers; parameters go there one by one as they are assigned."""
        to_device(self.model, device)

    def _weight_of(self, owner: nn.Module) -> str:
        return f"{next(name for name, module in self.model.named_modules() if module is owner)}.weight"


def _listed(config: Any) -> Architecture | None:
    """The table's entry of a model type. Raises UnsupportedArchitecture for one that is refused or writes no text."""
    listed = architecture(config.model_type)
    if not listed and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedArchitecture(f"model type {config.model_type!r} is not supported: it writes no text alone")
    return listed


def _in_one_piece(layout: ModelLayout, name: str) -> bool:
    """Whether a parameter is one whole tensor of a file, whose rows can be read by themselves."""
    parts = layout.source(name)
    return len(parts) == 1 and not parts[0].place and not isinstance(parts[0].info.encoding, Packed)


def _layer(entry: Architecture, index: int, module: nn.Module) -> Layer:
    """The layout of a decoder layer. Its feed-forward modules get forwards that can be observed and take a long prompt
    in chunks."""
    found = [(_find_block(module, block), size) for block, size in entry.blocks.items()]
    blocks = tuple(replace(block, size=size) for block, size in found if block)
    in_blocks = {name for block in blocks for name in block.rows}
    fixed = tuple(name for name, _ in module.named_parameters() if name not in in_blocks)
    for owner in {block.path.split(".")[0] for block in blocks if "." in block.path}:
        feed_forward = module.get_submodule(owner)
        feed_forward.forward = Pieces(feed_forward.forward)
    matrices = {name: shape for name in fixed if (shape := _matrix(module, name))}
    return Layer(f"{entry.layers}.{index}.", blocks, fixed, matrices)


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
            module.forward = partial(multiply, module)
    rows = {}
    for path, module in ups.items():
        for name, parameter in module.named_parameters():
            axis = 1 if flipped and parameter.ndim == 2 else 0
            rows[f"{path}.{name}"] = NeuronRows(axis, neurons, block.halves)
    name = f"{block.down}.weight"
    rows[name] = NeuronRows(0 if flipped else 1, neurons)
    return Block(block.down, neurons, 0, rows, name)


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


def _check_tokens(module: nn.Module, args: tuple[Tensor, ...], rows: int) -> None:
    """Raises PromptError for a token without a row. One token alone is not looked at on a GPU: the model itself chose
    it, and looking would wait for it."""
    looks = args and (args[0].shape[-1] > 1 or args[0].device.type == "cpu")
    if looks and bool(((args[0] < 0) | (args[0] >= rows)).any()):
        raise PromptError(f"the prompt has tokens beyond the table of {rows} embeddings")


def _compact_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
