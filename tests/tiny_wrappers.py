"""Tiny multimodal checkpoints in the classes that are published: a text model of tests/tiny_types.py beside towers that
have one small layer, as save_pretrained writes them."""

from pathlib import Path
from typing import Any

import torch
from tiny import randomise, tiny_tokenizer
from tiny_types import BOS_ID, EOS_ID, PAD_ID, TINY
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from griffin_offload.model.multimodal import TWINS

# Fields of the configs of towers, whatever a tower calls them.
_SMALL = {
    **dict.fromkeys(
        """hidden_size embed_dim d_model hidden_dim projection_dim out_hidden_size vision_output_dim
        output_dim projector_hidden_size""".split(),  # noqa: SIM905
        32,
    ),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim", "mlp_ratio_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "n_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads"), 2),
    **{"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]},
    **{"image_size": 28, "patch_size": 14, "head_dim": 16},
}
_AS = {"cohere_compass_text": "cohere2"}
# Fields of a wrapper's config, and of the configs inside it, where the small ones above do not do.
FIELDS: dict[str, dict[str, Any]] = {
    "qwen2_5_omni": {
        "enable_audio_output": False,
        "thinker_config": {"vision_start_token_id": 4},
        "talker_config": {"layer_types": ["full_attention"]},
    },
    "qwen3_omni_moe": {
        "enable_audio_output": False,
        "thinker_config": {"vision_start_token_id": 4, "text_config": {"num_experts": 4}},
        "talker_config": {
            "text_config": {"layer_types": ["full_attention"]},
            "code_predictor_config": {"layer_types": ["full_attention"]},
        },
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 4},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 4, "text_config": {"num_experts": 4}},
    "lfm3_vl": {"vision_config": {"layer_types": ["full_attention"]}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        }
    },
    "paddleocr_vl": {"text_config": {"head_dim": 8}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_embeddings": 16}},
    "idefics2": {"perceiver_config": {"resampler_depth": 1}},
    "ovis2": {"vision_config": {"vocab_size": 64, "num_visual_indicator_tokens": 5}},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "num_attention_heads": 1, "encoder_hidden_size": 64},
        "downsample_rate": "1/2",
        "spatial_target_layers": [0],
        "deepstack_layer_map": [[-1, 0]],
    },
    "nemotron_h_omni": {
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
        "vision_config": {"max_img_size": 64, "patch_size": 14, "image_size": 28},
    },
    "vibevoice_asr": {
        n: {"num_filters": 4, "depths": [1] * 7, "hidden_size": 8}
        for n in ("semantic_tokenizer_encoder_config", "acoustic_tokenizer_encoder_config")
    },
}


_SEEDS = {"fuyu": 3, "gemma3": 3}  # of others these repeat one word


def tiny_wrapper(
    folder: Path, kind: str, text: str | None = None, fields: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Write a random checkpoint of a wrapper's model type, in float32, with a tokenizer; return its model.

    `text`: another key of TINY for the text model inside than the wrapper's own; `fields`: more of its fields."""
    config = wrapper_config(kind, text)
    for name, value in (fields or {}).items():
        setattr(config.get_text_config(decoder=True), name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEEDS.get(kind, 0))
        model = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config).float().eval()
        randomise(model, writer(model))
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return model


def writer(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a wrapper that writes text."""
    if model.config.model_type.startswith(("qwen2_5_omni", "qwen3_omni_moe")):
        return getattr(model, "thinker", model)
    return model.language_model if model.config.model_type == "nemotron_h_omni" else model


def wrapper_config(kind: str, text: str | None = None) -> Any:
    """A wrapper's config with a tiny text model and small towers."""
    cls, fields = CONFIG_MAPPING[kind], FIELDS.get(kind, {})
    if text:
        fields = fields | {"text_config": {"model_type": text, **TINY[text]}}
    default = cls()
    inside = default.get_text_config(decoder=True)
    parts = {name: part for name in cls.sub_configs if (part := getattr(default, name, None))}
    made = {name: _smaller(part, fields.get(name, {}), inside) for name, part in parts.items()}
    return cls(**fields | made | {name: value for name, value in fields.items() if text and name == "text_config"})


def _text(kind: str) -> dict[str, Any]:
    """The fields of a tiny text model."""
    known = TWINS[kind][0] if kind in TWINS else _AS.get(kind, kind)
    fields = {**TINY[known], "model_type": kind}
    if kind in TWINS:  # positions in three dimensions: of time, height and width
        rotary = fields.get("head_dim", 8) // (4 if "moe" in kind and "glm" in kind else 2)
        sections = [rotary - 2 * (rotary // 4), rotary // 4, rotary // 4]
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return fields


def _smaller(config: Any, fields: dict[str, Any], inside: Any) -> dict[str, Any]:
    """The fields of a config in a wrapper: of the text model `inside`, or of a tower with small sizes."""
    if config is inside:
        return _text(config.model_type) | fields
    full = config.to_dict()
    small = {name: value for name, value in _SMALL.items() if full.get(name) is not None}
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None))}
    made = {name: _smaller(part, fields.get(name, {}), inside) for name, part in parts.items()}
    return full | small | {name: value for name, value in fields.items() if name not in made} | made
