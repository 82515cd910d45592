"""Which fields of a GGUF header change a model: applied (config.py, rope.py), or no matter, or refused by name.

What a field does: src/llama-model.cpp and src/llama-hparams.h of https://github.com/ggml-org/llama.cpp."""

import math
from typing import Any

from ...errors import UnsupportedArchitecture
from ...foreign import NAME, shown
from .values import Values

WAY_OUT = "use the original safetensors"
# Of each layer where they are lists; here all layers are alike.
_SIZES = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
_NO_MATTER = {
    "vocab_size",  # the tokens are counted
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",  # of a norm that these architectures do not have
}
# A factor of 1 changes nothing, and neither does 0, which llama.cpp takes for none.
_FACTORS = {"logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_FACTORS, (0, 1)),
    "attention.causal": (True,),
    "pooling_type": (0, -1, 2**32 - 1),  # none, and not said
}


def one_for_all(header: Values, prefix: str) -> Values:
    """The header with a number in place of a list that has one for each layer.

    Raises UnsupportedArchitecture where layers differ."""
    changed = Values(header, header.name)
    for key in _SIZES:
        value = header.get(key)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                told = f"{prefix}.{key} differs by layer ({str(value)[:60]})"
                raise UnsupportedArchitecture(f"{header.name}: {told}, which Griffin cannot apply: {WAY_OUT}")
            changed[key] = value[0]
    return changed


def check_fields(header: Values, applied: set[str], config: Any, prefix: str) -> None:
    """Raises UnsupportedArchitecture for a field that changes the model and is not among those `applied`.

    `header`: the fields of the architecture without its `prefix`."""
    expected = _expected(config)
    for key, value in header.items():
        if key in applied or key in _NO_MATTER or key.startswith("expert_"):  # a mixture is refused before
            continue
        if key in expected:
            fine = _same(value, expected[key]) or (not value and key != "rope.dimension_count")
        elif key in _NEUTRAL:
            fine = value in _NEUTRAL[key]
        elif key == "attention.sliding_window":
            fine = not value or (isinstance(value, int) and value >= config.max_position_embeddings)
        else:
            fine = not value or value == "none"
        if not fine:
            told = f", and the others make it {expected[key]}" if type(expected.get(key)) is int else ""
            said = f"{prefix}.{shown(key, NAME)} {shown(str(value), 60)}{told}"
            raise UnsupportedArchitecture(
                f"{header.name}: its header says {said}, which Griffin cannot apply: {WAY_OUT}"
            )


def _expected(config: Any) -> dict[str, Any]:
    """Fields that say again what others say: key -> the only value that the config can have."""
    size = config.head_dim
    again = ("key_length", "value_length", "key_length_swa", "value_length_swa")
    sizes = {f"attention.{key}": size for key in again} | {
        "rope.dimension_count": size,
        "rope.dimension_count_swa": size,
    }
    scale = float(getattr(config, "query_pre_attn_scalar", None) or size) ** -0.5
    slides = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
    patterns = [slides.index(False) + 1] if False in slides else [*range(len(slides) + 1, 100)] if slides else []
    return sizes | {"attention.scale": scale, "attention.sliding_window_pattern": (*patterns, slides)}


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return any(_same(value, one) for one in expected)
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-5)
    return bool(value == expected)
