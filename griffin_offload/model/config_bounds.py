"""Bounds of a config.json, checked before transformers makes lists and tables of its numbers."""

import re
from typing import Any

from ..errors import CheckpointError

DROPPED = ("num_labels", "id2label", "label2id", "problem_type")  # of classifiers: transformers lists every label
DEEPEST = 32  # objects within objects
# Names of fields -> the most that they may be. The first that fits counts.
BOUNDS = {
    re.compile(r"(_tokens?|_token_ids?|theta|factor|base|window|length|seq_len|positions?|_embeddings|n_ctx)$"): 2**48,
    re.compile(r"layers?$|depths?$"): 2**14,
    re.compile(r"experts?$"): 2**16,
    re.compile(r"(size|dims?|hidden|heads?|groups?|rank|kernel|width|inner|embd|model|state|^d_\w+)$"): 2**24,
}
# Types that make a table of all positions, or of all pairs of them -> the most positions.
TABLES = {"gpt_neo": 2**13, "gpt_bigcode": 2**14} | dict.fromkeys(("codegen", "ctrl", "gptj", "xglm"), 2**17)
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")


def bounded_config(facts: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """The fields of a config.json, and of the configs in it, without those that make labels.

    Raises CheckpointError for a number that no model has."""
    if depth > DEEPEST:
        raise CheckpointError(f"it is nested more than {DEEPEST} deep")
    most = TABLES.get(str(facts.get("model_type")))
    for name in POSITIONS if most else ():
        _check(name, facts.get(name), most)
    found = {}
    for name, value in facts.items():
        if name in DROPPED:
            continue
        bound = next((bound for names, bound in BOUNDS.items() if names.search(name)), 2**63 - 1)
        _check(name, value, bound)
        found[name] = bounded_config(value, depth + 1) if isinstance(value, dict) else value
    return found


def _check(name: str, value: Any, most: int | None) -> None:
    if isinstance(value, int) and most is not None and abs(value) > most:
        raise CheckpointError(f"{name[:60]} is {str(value)[:20]}; the most is {most}")
