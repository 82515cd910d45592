"""Fields of config.json that act against our own KV cache and attention: overridden, or refused by name."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedArchitecture, one_line
from .kv_cache import windows

_ATTENTION = ("eager", "sdpa")
# Training, and programs that look inside, leave these behind; an answer does not depend on them.
_PLAIN = {"use_cache": True, "return_dict": True, "output_hidden_states": False, "is_encoder_decoder": False}


def override_fields(folder: Path, config: Any) -> list[str]:
    """Sets fields of a config, before the model is built, to what Griffin needs. Returns what was overridden, in words.

    Raises UnsupportedArchitecture for a model that does not read from left to right, CheckpointError for a window that
    is none."""
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
    try:
        least = min((window for window in windows(config) if window is not None), default=1)
        fine = least >= 1
    except Exception as error:  # transformers makes its layers' caches of fields of any type
        raise CheckpointError(f"{folder}/config.json does not describe a model: {one_line(error)}") from None
    if not fine:
        raise CheckpointError(f"{folder}/config.json: sliding_window is {least}; it is a number of tokens, 1 or more")
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
