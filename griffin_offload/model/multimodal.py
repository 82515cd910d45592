"""The text model inside a multimodal checkpoint, opened in place: its config, and its tensors by the names that its own
causal class has for them.

transformers says where they are. Its auto classes map the wrapper's config to a class, which is built on `meta`; that
class's conversion table gives every tensor of the files its name in the wrapper; and the wrapper's module whose class
is that of the text config holds the text model. Vision and audio towers are left out: they are neither read nor
counted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from ..checkpoint.conversion import pieces
from ..checkpoint.headers import Checkpoint
from ..errors import CheckpointError, PromptError, UnsupportedArchitecture
from .architecture import architecture
from .wrappers import WRAPPERS, refuse_wrapper

# Text types without a causal class -> the type that computes the same where a prompt has no image (positions in three
# dimensions are then the same three times), and fields of its config that the text type does not have.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "cosmos3_edge_text": ("arcee", {}),
    "glm4v_moe_text": ("glm4_moe", {"use_qk_norm": False}),
    "glm4v_text": ("glm4", {"partial_rotary_factor": 1.0}),
    "glm_ocr_text": ("glm4", {"partial_rotary_factor": 1.0, "attention_bias": False}),
    "granite4_vision_text": ("granite", {}),
    "granite_docling_text": ("granite", {}),
    "hunyuan_vl_text": ("hunyuan_v1_dense", {}),
    "paddleocr_vl_text": ("llama", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen3_omni_moe_text": ("qwen3_moe", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_vl_text": ("qwen3", {}),
}
IMAGE_POSITIONS = ("mrope_section", "mrope_interleaved")  # of rope_parameters; a text model has no use for them


def text_config(config: Any) -> Any:
    """A checkpoint's config -> that of its text model: the same one, unless it is a multimodal wrapper's.

    Raises UnsupportedArchitecture, with the reason, for a wrapper whose text model does not run."""
    kind = config.model_type
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return config
    refuse_wrapper(kind)
    if kind not in WRAPPERS:
        raise UnsupportedArchitecture(f"model type {kind!r} is not supported: Griffin was not tried with this wrapper")
    inside = config.get_text_config(decoder=True)
    causal, more = TWINS.get(inside.model_type, (inside.model_type, {}))
    if not architecture(causal):  # it raises for a type that is refused
        raise UnsupportedArchitecture(f"model type {kind!r}: the text model inside, {causal!r}, is not supported")
    return _causal_config(config, inside, causal, more)


def _causal_config(wrapper: Any, inside: Any, causal: str, more: Mapping[str, Any]) -> Any:
    """The text model's config as its causal class takes it; tokens and ties are the wrapper's, where it names them."""
    fields = {**inside.to_dict(), **more}
    if isinstance(rope := fields.get("rope_parameters"), dict):
        kept = {name: value for name, value in rope.items() if name not in IMAGE_POSITIONS and value != "mrope"}
        fields["rope_parameters"] = kept
    for name in ("bos_token_id", "eos_token_id", "dtype"):
        if (value := getattr(wrapper, name, None)) is not None:
            fields[name] = value
    fields["tie_word_embeddings"] = bool(getattr(wrapper, "tie_word_embeddings", fields.get("tie_word_embeddings")))
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[causal]]
    fields.pop("model_type")
    return CONFIG_MAPPING[causal].from_dict(fields)


def text_checkpoint(wrapper: Any, config: Any, checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of a wrapper's text model, with their places in its parameters; `bytes`: of these tensors alone.

    Raises UnsupportedArchitecture for a tensor that transformers would transpose, CheckpointError where there is no
    text model."""
    with torch.device("meta"):
        model = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(wrapper)](wrapper)
    prefixes = _prefixes(model, wrapper.get_text_config(decoder=True), config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if _own_name(name, prefixes)}
    placed = pieces(model, checkpoint, shapes)
    found = {own: parts for name, parts in placed.items() if (own := _own_name(name, prefixes))}
    infos = {piece.info.name for parts in found.values() for piece in parts}
    if not infos:
        raise CheckpointError(f"{checkpoint.folder}: none of its tensors belongs to the text model")
    tensors = {name: info for name, info in checkpoint.tensors.items() if name in infos}
    others = {name: info for name, info in checkpoint.tensors.items() if name not in infos}
    size = sum(info.all_bytes for info in tensors.values())
    return replace(checkpoint, tensors=tensors, bytes=size, pieces=found, others=others)


def _prefixes(model: Any, inside: Any, config: Any) -> Mapping[str, str]:
    """Modules of the wrapper -> their names in the text model's causal class: the decoder and the lm_head."""
    wanted = MODEL_MAPPING.get(type(inside), None)
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    decoder = [name for name, module in named if (type(module) is wanted if wanted else module.config is inside)]
    if not decoder:
        raise UnsupportedArchitecture(f"model type {model.config.model_type!r}: its text model was not found in it")
    head, last = model.get_output_embeddings(), re.compile(r"(^|\.)lm_head$")  # some wrappers do not say which it is
    named = model.named_modules()
    lm_head = next(name for name, module in named if (module is head if head is not None else last.search(name)))
    return {decoder[0]: MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix, lm_head: "lm_head"}


def _own_name(name: str, prefixes: Mapping[str, str]) -> str | None:
    """A parameter's name in the text model; None for one of a tower."""
    for before, after in prefixes.items():
        if name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return None


def refuse_media(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises PromptError for a message with a part that is no text: an image, a video, a sound."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text":
                raise PromptError(
                    f"a message has a part of type {kind!r}: Griffin runs the text model of a checkpoint and reads no "
                    "images, videos or sounds; leave it out, or describe it in words"
                )
