"""Sizes in a transformers config, whatever its type calls them."""

from typing import Any


def context_length(config: Any) -> int:
    """The most tokens that a model reads; without positions (ALiBi) its training length, or 2048."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
    return next((int(n) for name in names if (n := getattr(config, name, None)) is not None), 2048)


def experts_per_token(config: Any) -> int:
    """To how many routed experts a token goes, at most; a large number where no field says it."""
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    found = [n for name in names if hasattr(type(config), name) and (n := getattr(config, name, None))]
    return max((max(n) if isinstance(n, list) else int(n) for n in found), default=2**31)


def rope_changes(config: Any) -> bool:
    """Whether the rotary frequencies depend on how many tokens there are."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in each)
