"""Position scaling in a GGUF header <-> transformers' rope parameters."""

from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedArchitecture
from ...foreign import shown
from .fields import WAY_OUT
from .values import Values

FACTORS = "rope_freqs.weight"
_TYPE, _FACTOR = "rope.scaling.type", "rope.scaling.factor"
_OLD_FACTOR = "rope.scale_linear"  # until November 2023, without a type
_ORIGINAL = "rope.scaling.original_context_length"
_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
SCALING_FIELDS = {_TYPE, _FACTOR, _OLD_FACTOR, _ORIGINAL, *_BETAS}
# What llama.cpp multiplies by in YaRN -> the values that leave it as transformers has it.
_YARN = {
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
}


def scaling(header: Values, prefix: str) -> dict[str, Any] | None:
    """transformers' rope_scaling of a header (without its `prefix`); None: positions are not scaled. As llama.cpp does,
    a factor without a type scales linearly. Raises UnsupportedArchitecture for a type that cannot be applied."""
    name, kind = header.name, header.text(_TYPE, "linear")
    factor = header.number(_FACTOR) or header.number(_OLD_FACTOR) or 0
    for key, neutral in _YARN.items():
        if key in header and header[key] not in neutral:
            said = f"{prefix}.{key} {shown(str(header[key]), 60)}"
            raise UnsupportedArchitecture(f"{name}: its header says {said}, which Griffin cannot apply: {WAY_OUT}")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        original = header.whole(_ORIGINAL) or header.whole("context_length")
        more = {ours: float(beta) for key, ours in _BETAS.items() if (beta := header.number(key))}
        own = {"original_max_position_embeddings": original}
        return {"rope_type": "yarn", "factor": float(factor), **own, **more}
    told = f"{prefix}.{_TYPE} {shown(kind, 40)}"
    raise UnsupportedArchitecture(
        f"{name} scales its positions ({told}), of which its header says too little: {WAY_OUT}"
    )


def scaling_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `scaling`; nothing for types of which a header says too little."""
    if rope.get("rope_type") not in ("linear", "yarn"):
        return {}
    fields: dict[str, Any] = {_TYPE: rope["rope_type"], _FACTOR: float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        fields |= {_ORIGINAL: int(rope["original_max_position_embeddings"])}
        fields |= {key: float(rope[ours]) for key, ours in _BETAS.items() if rope.get(ours) is not None}
    return fields


def llama3_rope(config: Any, factors: Any, name: str) -> dict[str, Any]:
    """Llama 3.1's position scaling, of which a GGUF has only the divisors of the frequencies: (head_dim / 2,), float32.

    Rebuilt from the published constants and the largest divisor, and compared with the file's."""
    import torch

    plain = dict(config.rope_parameters)
    if plain["rope_type"] != "default":
        raise UnsupportedArchitecture(
            f"{name} scales its positions twice, by its header and by {FACTORS}, which Griffin cannot apply: {WAY_OUT}"
        )
    rope = plain | {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 3),  # of a float32 quotient
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = rope
    if not torch.allclose(rope_factors(config), torch.from_numpy(factors), rtol=1e-3):
        raise UnsupportedArchitecture(
            f"{name} scales its positions in a way that is not Llama 3.1's: use the original safetensors"
        )
    return rope


def rope_factors(config: Any) -> Any:
    """A config with Llama 3.1's position scaling -> the divisors of its frequencies: (head_dim / 2,), float32."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, size = config.rope_parameters["rope_theta"], config.head_dim
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return frequencies / scaled
