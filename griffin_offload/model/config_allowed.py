"""What of a config.json reaches transformers: the fields that a model type's own config class knows, and no others.

The class knows those that it declares, their other names, and those of older files that its code translates. All else
would become an attribute that some code of transformers may act on: load a repository's kernel, import a module, fetch
a backbone."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointError
from ..foreign import shown

# Read by modules where it is there, but not declared by every type; and what Griffin reads itself.
ALWAYS = frozenset(
    """model_type head_dim sliding_window beta router_bias rope_theta rope_scaling original_max_position_embeddings
    partial_rotary_factor torch_dtype dtype attn_implementation quantization_config compression_config
    transformers_weights layer_types tie_word_embeddings tokenizer_class bos_token_id eos_token_id
    pad_token_id max_seq_len seq_length n_positions max_position_embeddings is_causal
    per_layer_config vocab_size""".split()  # noqa: SIM905
)
# Declared or translated by some class, and never passed on: they name code, or another place to load from.
NEVER = frozenset(
    """auto_map _name_or_path name_or_path experts_implementation _experts_implementation _attn_implementation
    backbone backbone_kwargs use_timm_backbone use_pretrained_backbone custom_pipelines
    trust_remote_code""".split()  # noqa: SIM905
)
DTYPES = ("dtype", "torch_dtype")
OWN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def allowed_config(facts: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """The fields of a config.json, or of a config inside it, that `kind`, its class, knows.

    Raises CheckpointError for a dtype that is none."""
    found = {}
    for name, value in facts.items():
        if name not in known_fields(kind) or name in NEVER:
            continue
        if name == "attn_implementation" and value not in OWN_ATTENTION:  # a repository's kernel, by its name
            continue
        if name in DTYPES:
            _check_dtype(name, value)
        found[name] = value
        if name in kind.sub_configs and isinstance(value, dict):
            found[name] = allowed_config(value, _class_inside(kind, name, value.get("model_type")))
    return found


@cache
def known_fields(kind: Any) -> frozenset[str]:
    """The names of fields that a config class knows."""
    found = {*ALWAYS, *kind.attribute_map, *kind.attribute_map.values(), *kind.sub_configs}
    found |= {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    for each in kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]:
        found |= {name for code in _codes(each) for name in _texts(code)}
    if "text_config" in kind.sub_configs:  # older files have its fields beside it
        found |= known_fields(_class_inside(kind, "text_config", None))
    return frozenset(found)


def _codes(kind: Any) -> Iterator[CodeType]:
    for member in vars(kind).values():
        function = getattr(member, "__func__", member)
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            yield code


def _texts(code: CodeType) -> Iterator[str]:
    """Texts in a function's code, which names the fields of older files there."""
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, CodeType):
            yield from _texts(constant)
        elif isinstance(constant, tuple | frozenset):
            yield from (each for each in constant if isinstance(each, str))


def _class_inside(kind: Any, name: str, named: Any) -> Any:
    """The class of a config inside a config: the one that its class says, else of the model type that is named there,
    else of the type that is usual."""
    inside = kind.sub_configs[name]
    if isinstance(inside, type) and issubclass(inside, PreTrainedConfig):
        return inside
    usual = getattr((kind.sub_configs_defaults or {}).get(name), "model_type", None)
    found = next((each for each in (named, usual) if isinstance(each, str) and each in CONFIG_MAPPING), None)
    known: type[Any] = CONFIG_MAPPING[found] if found else PreTrainedConfig
    return known


def _check_dtype(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and isinstance(_dtype(value), torch.dtype)):
        raise CheckpointError(f"{name} is {shown(repr(value), 60)}, which is no dtype of torch")


def _dtype(name: str) -> Any:
    return torch.float32 if name == "auto" else getattr(torch, name.removeprefix("torch."), None)
