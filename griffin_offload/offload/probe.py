"""Proof for a structure that was guessed: a tiny random model of the same type, streamed and pruned, against itself.

The sweep at sparsity 0 must give the whole model's logits, and the pruned model those of the whole one with the other
neurons at zero. Both run in float32, in a second or two.
"""

import copy
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from ..checkpoint.headers import Checkpoint
from ..checkpoint.reader import Reader
from ..errors import GriffinError, UnsupportedArchitecture
from ..model.architecture import Architecture
from ..model.hooks import Tap
from ..model.skeleton import Skeleton
from ..planning.sizes import model_sizes
from ..pruning.selection import Selection
from ..workspace import workspace
from .layer_stream import LayerStream
from .outer_weights import load_outer_weights
from .pruner import Pruner
from .resident_layer import ResidentLayer, resident_layers
from .sweep import Sweep

# A tiny model's sizes, where its config has them. Ratios as usual: two query heads to one key, F three times hidden.
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
}
PROMPT, NEXT = 24, 4
TOLERANCE = 1e-3  # of the largest logit; a wrong structure is off by its own size


def probe(config: Any, entry: Architecture) -> None:
    """Raises UnsupportedArchitecture where a tiny model of the config's type does not agree, or cannot be made."""
    kind = config.model_type
    try:
        with workspace(Path(tempfile.gettempdir())) as folder, torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_tiny(config), dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            model.save_pretrained(folder)
            wrong = _compare(model, folder, entry)
    except GriffinError:
        raise
    except Exception as error:  # whatever a modelling file makes of unusual sizes
        raise UnsupportedArchitecture(
            f"model type {kind!r} is not known, and a tiny one could not be tried: {type(error).__name__}: {error}"
        ) from None
    if wrong:
        raise UnsupportedArchitecture(f"model type {kind!r} is not known, and a tiny one fails the probe: {wrong}")


def _tiny(config: Any) -> Any:
    small = copy.deepcopy(config)
    for name, size in SIZES.items():
        if getattr(small, name, None) is not None:
            with suppress(AttributeError):  # some types derive it from others
                setattr(small, name, size)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: SIZES["num_hidden_layers"]]
    return small


def _compare(model: Any, folder: Path, entry: Architecture) -> str:
    """What differs, or ''."""
    skeleton = Skeleton(model.config, torch.float32, entry)
    skeleton.bind(Checkpoint.open(folder))
    ids = torch.randint(4, SIZES["vocab_size"], (1, PROMPT + NEXT))
    prompt, following = ids[:, :PROMPT], ids[:, PROMPT:]
    for sparsity in (0.0, 0.5):
        kept = model_sizes(skeleton.layout).kept(sparsity)
        layers = resident_layers(skeleton.layout, kept, ["cpu"] * len(kept))
        first, after = _streamed(skeleton, layers, prompt, following)
        cache = DynamicCache(config=model.config)
        whole = model(prompt, past_key_values=cache).logits
        if _differ(first, whole):
            return f"the streamed prompt's logits are not the model's at sparsity {sparsity:g}"
        taps = _mask(skeleton, model, layers) if sparsity else []
        masked = model(following, past_key_values=cache).logits
        for tap in taps:
            tap.remove()
        if _differ(after, masked):
            return "the pruned model is not the masked one" if sparsity else "the streamed model is not the whole one"
    return ""


def _streamed(
    skeleton: Skeleton, layers: list[ResidentLayer], prompt: Tensor, following: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the sweep over the prompt, and of the tokens after it."""
    reader, cache = Reader(), DynamicCache(config=skeleton.config)
    try:
        load_outer_weights(skeleton, reader, "cpu")
        stream = LayerStream(skeleton, reader, layers, copies=False, steady=False)
        with Sweep(stream, Pruner(skeleton.layout, skeleton.modules, layers, Selection())):
            first = skeleton.model(prompt, past_key_values=cache).logits
        return first, skeleton.model(following, past_key_values=cache).logits
    finally:
        reader.close()


def _mask(skeleton: Skeleton, model: Any, layers: list[ResidentLayer]) -> list[Tap]:
    """Zeroes the neurons of the whole model that the skeleton does not keep."""
    taps = []
    for layer, resident in zip(skeleton.layers, layers, strict=True):
        for block, kept_neurons in zip(layer.blocks, resident.kept_neurons, strict=True):

            def watch(z: Tensor, tokens: Any, expert: Any, kept_neurons: Tensor = kept_neurons) -> Tensor:
                masked = torch.zeros_like(z)
                masked[..., kept_neurons] = z[..., kept_neurons]
                return masked

            taps.append(Tap(model.get_submodule(layer.prefix.rstrip(".")), block.path, watch))
    return taps


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() > TOLERANCE * theirs.abs().max())
