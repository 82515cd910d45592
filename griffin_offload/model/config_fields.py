"""Fields of config.json that act against our own KV cache and attention: overridden, or refused by name."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UnsupportedArchitecture

_ATTENTION = ("eager", "sdpa")
# Training, and programs that look inside, leave these behind; an answer does not depend on them.
_PLAIN = {"use_cache": True, "return_dict": True, "output_hidden_states": False}


def override_fields(folder: Path, config: Any) -> list[str]:
    """Sets fields of a config, before the model is built, to what Griffin needs. Returns what was overridden, in words.

    Raises UnsupportedArchitecture for a model that does not read from left to right."""
    told = []
    for field, value in _PLAIN.items():
        if hasattr(config, field):
            setattr(config, field, value)
    config._output_attentions = False
    config._experts_implementation = None  # our own forward takes their place, or transformers' default
    attention = config._attn_implementation
    if attention is not None and attention not in _ATTENTION:
        told.append(f"attn_implementation {attention} of config.json: attention is by torch's own kernels")
        config._attn_implementation = None
    if field := _not_causal(config):
        raise UnsupportedArchitecture(
            f"{folder}/config.json: {field}: its tokens look at later ones too, so that it writes no text; "
            "use a model that reads from left to right"
        )
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if type(pad) is int and type(rows) is int and not -rows <= pad < rows:
        told.append(f"pad_token_id {pad} of config.json: the table of embeddings has {rows} rows")
        config.pad_token_id = None
    return told


def _not_causal(config: Any) -> str:
    """The field that lets tokens look at later ones; '' where none does."""
    if getattr(config, "is_causal", True) is False:
        return "is_causal false"
    name = "use_bidirectional_attention"
    both = getattr(config, name, None) if name in {field.name for field in fields(config)} else None
    return f"{name} {str(both).lower()}" if both is True or both == "all" else ""
