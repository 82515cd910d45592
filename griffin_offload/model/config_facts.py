"""Sizes in a transformers config, whatever its type calls them."""

from typing import Any

LENGTHENING = ("linear", "dynamic", "yarn", "longrope")  # by a factor, where it is given


def context_length(config: Any) -> int:
    """The most tokens that a model reads, as its rope settings make it; without positions (ALiBi) its training length,
    or 2048.

    Makers say to switch YaRN and dynamic NTK on by a factor alone: max_position_embeddings stays as it was. Where it
    was raised too, original_max_position_embeddings tells by how much."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
    length = next((int(n) for name in names if (n := getattr(config, name, None)) is not None), 2048)
    rope = getattr(config, "rope_parameters", None) if hasattr(type(config), "rope_parameters") else None
    nested = [each for each in (rope or {}).values() if isinstance(each, dict)]  # of each kind of layer
    reached = [_reached(each, length) for each in nested if each.get("rope_type") != "linear"]  # Gemma 3 raises both
    return max(length, *reached, _reached(rope or {}, length))


def _reached(rope: dict[str, Any], length: int) -> int:
    """How many tokens rope parameters make of a model that was trained on `length`."""
    if rope.get("rope_type") not in LENGTHENING:
        return 0
    return int((rope.get("original_max_position_embeddings") or length) * (rope.get("factor") or 1))


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
