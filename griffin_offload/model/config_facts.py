"""Sizes in a transformers config, whatever its type calls them."""

from collections.abc import Sequence
from typing import Any

from .architecture import ARCHITECTURES


def context_length(config: Any) -> int:
    """The most tokens that a model reads; without positions (ALiBi) its training length, or 2048."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
    return next((int(n) for name in names if (n := getattr(config, name, None)) is not None), 2048)


def layer_configs(config: Any) -> Sequence[Any]:
    """A config for each layer where sizes differ by layer: the model's config then raises for them. Else one config."""
    return getattr(config, "per_layer_config", None) or [config]


def key_value_heads(config: Any) -> int:
    """Heads of the keys and values in the cache: the most of any layer."""
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        return 1  # DeepSeek's latent keys and values
    if getattr(config, "new_decoder_architecture", False):
        return heads  # Falcon caches them repeated for every head
    if getattr(config, "multi_query", False):
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    shared = next((int(n) for name in names if (n := getattr(config, name, None))), heads)
    known = ARCHITECTURES.get(config.model_type)
    return shared * known.sliding_heads if known else shared


def key_size(config: Any) -> int:
    """Elements of a key or value of one head: the most of any layer."""
    if latent := getattr(config, "kv_lora_rank", None):
        return max(int(latent), int(config.qk_rope_head_dim))
    names = ("v_head_dim", "global_head_dim", "swa_head_dim")
    return max(head_size(config), *(int(getattr(config, name, None) or 0) for name in names))


def experts_per_token(config: Any) -> int:
    """To how many routed experts a token goes, at most; a large number where no field says it."""
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    found = [n for name in names if (n := getattr(config, name, None))]
    return max((max(n) if isinstance(n, list) else int(n) for n in found), default=2**31)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_changes(config: Any) -> bool:
    """Whether the rotary frequencies depend on how many tokens there are."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in each)
