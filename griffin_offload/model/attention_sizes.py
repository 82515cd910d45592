"""Sizes of attention, from the modules that transformers built. A config may have fields that its type ignores."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

_KEYS, _VALUES = ("k_proj", "key", "Wk"), ("v_proj", "value", "Wv")
_QUERIES = ("q_proj", "q_b_proj", "query", "Wq")
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")  # queries, keys and values in one
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
_LATENT, _UNFOLD = "kv_a_proj_with_mqa", "kv_b_proj"  # DeepSeek's compressed keys and values, with rotated ones beside


@dataclass(frozen=True)
class AttentionSizes:
    """Elements of one token, the most of any layer: `cached` of its keys in the KV cache, or of its values; `width` of
    its queries."""

    cached: int
    width: int


def attention_sizes(layers: Iterable[nn.Module], config: Any) -> AttentionSizes:
    """The sizes in a model's decoder layers; where no module is known, a token's whole hidden state counts."""
    owners = [module for layer in layers for name, module in layer.named_modules() if "linear_attn" not in name]
    latent = [found for module in owners if (found := _latent(module))]  # other layers beside these cache no keys
    found = latent or [found for module in owners if (found := _keys_and_values(module) or _in_one(module))]
    most = int(getattr(config, "hidden_size", 0))
    return AttentionSizes(
        cached=max((sizes.cached for sizes in found), default=most),
        width=max((sizes.width for sizes in found), default=most),
    )


def _latent(module: nn.Module) -> AttentionSizes | None:
    compressed, unfold = _child(module, (_LATENT,)), _child(module, (_UNFOLD,))
    if not compressed or not unfold:
        return None
    rank = unfold[1]
    return AttentionSizes(max(rank, compressed[0] - rank), _width(module))


def _keys_and_values(module: nn.Module) -> AttentionSizes | None:
    keys, values = _child(module, _KEYS), _child(module, _VALUES)
    if not keys:
        return None
    return AttentionSizes(max(keys[0], values[0] if values else 0), _width(module))


def _in_one(module: nn.Module) -> AttentionSizes | None:
    fused, output = _child(module, _FUSED), _child(module, _OUTPUT)
    if not fused or not output:
        return None
    if getattr(module, "new_decoder_architecture", False):  # Falcon's, which caches keys for every head
        return AttentionSizes(output[1], output[1])
    return AttentionSizes((fused[0] - output[1]) // 2, output[1])


def _width(module: nn.Module) -> int:
    queries, output = _child(module, _QUERIES), _child(module, _OUTPUT)
    return max(queries[0] if queries else 0, output[1] if output else 0)


def _child(module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear module right below this one."""
    for name in names:
        child = module._modules.get(name)
        if isinstance(child, nn.Linear):
            return child.weight.shape[0], child.weight.shape[1]
        if isinstance(child, Conv1D):
            return child.weight.shape[1], child.weight.shape[0]
    return None
