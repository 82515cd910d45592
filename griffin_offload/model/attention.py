"""Attention over a long prompt in pieces of its tokens, without a mask or scores of tokens x tokens; and attention of
one token on a CPU, faster than torch's.

transformers gets a mask from a mask function, and gives it to the attention function of every layer. Our mask function
returns a `Mask`, and our attention function asks it for the rows of each piece; the products are transformers' own. A
short prompt, or a causal one that needs no mask, passes unchanged.
T tokens of the prompt, C of a piece, K keys; B batch, H heads of keys, G queries for each, D head size.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda as kernels
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import and_masks, eager_mask, padding_mask_function, sdpa_mask

from . import modules
from .architecture import ARCHITECTURES

SDPA, EAGER = "griffin-sdpa", "griffin-eager"
HIDDEN = -65504.0  # added to the score of a key that is not seen: its weight is 0. cuDNN's kernels take no infinity
ALIGNED = 16  # numbers: where rows of a mask begin, for torch's kernels
SCRATCH = 2**20  # float32 keys or values at a time, in memory that is kept: fresh pages cost more than products


@dataclass(frozen=True)
class Mask:
    """A prompt's mask (B, 1, T, K) that is written in rows. `window`: tokens that a token looks back.

    `q_offset` and `kv_offset` in the arguments: the numbers of the first token and of the first key."""

    write: Callable[..., Tensor]
    arguments: dict[str, Any]
    window: int | None

    def rows(self, begin: int, end: int) -> tuple[Tensor, slice]:
        """The mask (B, 1, C, K) of tokens [begin, end), and the slice of its keys."""
        first_token, first_key = self.arguments.get("q_offset", 0), self.arguments.get("kv_offset", 0)
        begin, end = first_token + begin, first_token + end
        first = max(first_key, begin - self.window + 1) if self.window else first_key
        part = {"q_length": end - begin, "q_offset": begin, "kv_length": end - first, "kv_offset": first}
        keys = slice(first - first_key, end - first_key)
        return self.write(**self.arguments | part | {"allow_is_causal_skip": False}), keys


def leave_cudnn_out() -> None:
    """Turns cuDNN's attention off in this process, which torch takes first on Hopper and Blackwell. On a B200 its
    numbers are wrong with few heads of keys (torch 2.11 and 2.13, cuDNN 9.19 and 9.20), it prepares itself anew for
    each length, and how it reads a mask that all queries share is not documented."""
    kernels.enable_cudnn_sdp(False)


def use_pieces(model: Any) -> None:
    """Makes a model's attention run in pieces, if its code leaves attention and masks to transformers."""
    names = {"sdpa": SDPA, "eager": EAGER}
    here, known = model.config._attn_implementation, ARCHITECTURES.get(model.config.model_type)
    if here in names and model._supports_attention_backend and not (known and known.own_mask):
        model.set_attn_implementation(names[here])


def in_pieces(model: Any) -> bool:
    return model.config._attn_implementation in (SDPA, EAGER)


def writes_scores(model: Any) -> bool:
    """Whether scores (or biases) of all pairs of tokens are in memory for each head."""
    return model.config._attn_implementation in ("eager", EAGER) or bool(getattr(model.config, "alibi", False))


def _mask(write: Callable[..., Any], **arguments: Any) -> Any:
    if isinstance(arguments.get("q_offset"), Tensor):  # of a static step
        in_a_ring = isinstance(arguments.get("kv_offset"), Tensor)
        return _added(_ring_mask(write, **arguments) if in_a_ring else write(**arguments), arguments["dtype"])
    tokens, padding, window = arguments["q_length"], arguments.get("attention_mask"), arguments.get("local_size")
    first, last_key = arguments.get("q_offset", 0), arguments["kv_length"] + arguments.get("kv_offset", 0)
    if tokens <= modules.PIECE or last_key != first + tokens:
        return write(**arguments)
    skips = arguments.get("allow_is_causal_skip", True) and write is sdpa_mask and not first
    if skips and (window is None or window >= tokens) and (padding is None or bool(padding.all())):
        return None
    return Mask(write, arguments, window)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (B, 1, T, K), bool, as numbers that are added to the scores, in aligned rows: what torch's kernels take.
    Otherwise torch would make such numbers of it in every layer; here they are made once for a token."""
    if mask.dtype != torch.bool:
        return mask
    keys = mask.shape[-1]
    room = mask.new_full((*mask.shape[:-1], -(-keys // ALIGNED) * ALIGNED), HIDDEN, dtype=dtype)
    return room[..., :keys].masked_fill_(mask, 0.0)


def _ring_mask(write: Callable[..., Any], **arguments: Any) -> Any:
    """The mask of keys that lie in a ring: `kv_offset` (K,) tells the token of each (static_cache.Ring).

    The padding is looked up token by token: transformers would compare its length with the offset, on the host."""
    padding = arguments.pop("attention_mask", None)
    if padding is not None:
        arguments["mask_function"] = and_masks(arguments["mask_function"], padding_mask_function(padding.bool()))
    return write(**arguments)


def _attend(
    attend: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **more: Any,
) -> Any:
    if not isinstance(attention_mask, Mask):
        if not module.training and _is_alone(attend, query, key, value, attention_mask):
            scale = query.shape[3] ** -0.5 if more.get("scaling") is None else more["scaling"]
            return attend_one(query, key, value, attention_mask, scale), None
        if attention_mask is None and attend is sdpa_attention_forward and not _has_kernel(query, key, value):
            key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
        return attend(module, query, key, value, attention_mask, **more)
    outputs = []
    for begin in range(0, query.shape[2], modules.PIECE):
        end = min(begin + modules.PIECE, query.shape[2])
        rows, keys = attention_mask.rows(begin, end)
        outputs.append(attend(module, query[:, :, begin:end], key[:, :, keys], value[:, :, keys], rows, **more)[0])
    return torch.cat(outputs, dim=1), None


def _is_alone(attend: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether this is one token's attention that `attend_one` computes faster: on a CPU; elsewhere under a mask, where
    transformers would write the keys out for every query of a group."""
    if query.shape[2] != 1 or attend is not sdpa_attention_forward:
        return False
    grouped = query.shape[1] > key.shape[1] and value.shape[3] == key.shape[3]
    if query.device.type != "cpu" and (mask is None or not grouped):
        return False
    return mask is None or mask.shape[3] == key.shape[2]


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch has a kernel for a prompt without a mask whose queries share keys. On a GPU that is for half
    precision on Ampere or later; elsewhere torch (2.11 to 2.13) would write the scores of all pairs of tokens."""
    if query.device.type != "cuda" or query.shape[2] == 1 or query.shape[1] == key.shape[1]:
        return True
    given = kernels.SDPAParams(query, key, value, None, 0.0, True, True)
    return kernels.can_use_flash_attention(given) or kernels.can_use_efficient_attention(given)


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one token of each sequence: query (B, H G, 1, D), keys and values (B, H, K, D) -> (B, 1, H G, D).

    `mask` (B, 1, 1, K), or with a row for each head: bool (True: seen), or added to the scores. Sums are in float32.
    After hundreds of tokens torch's kernel for one query in half precision (2.13, CPU) takes 3 to 11 times as long
    (docs/benchmarks.md); several queries, such as the G of a group, it does well."""
    batch, heads, keys, size = key.shape
    grouped = query.reshape(batch, heads, -1, size)
    rows = mask if mask is None or mask.shape[1] == 1 else mask.reshape(*mask.shape[:1], *grouped.shape[1:3], keys)
    kernel = query.dtype != torch.float32 or query.device.type != "cpu"
    if kernel and grouped.shape[2] > 1 and value.shape[3] == size:
        rows = rows if rows is None or rows.dtype == torch.bool else rows.to(query.dtype)
        together = scaled_dot_product_attention(grouped, key, value, attn_mask=rows, scale=scale)
        return together.reshape(batch, 1, query.shape[1], size)
    grouped = grouped.float() * scale
    scores = torch.cat([grouped @ part.transpose(2, 3) for part in _in_float(key)], dim=-1)
    if rows is not None:
        scores = scores.masked_fill_(~rows, -torch.inf) if rows.dtype == torch.bool else scores.add_(rows)
    weights = scores.softmax(-1)
    parts = zip(weights.split(_step(value), dim=-1), _in_float(value), strict=True)
    out = torch.stack([of_part @ part for of_part, part in parts]).sum(0)
    return out.view(batch, 1, query.shape[1], -1).to(query.dtype)


def _step(states: Tensor) -> int:
    """Tokens of keys or values that fit the scratch; all if they are float32 already."""
    batch, heads, tokens, size = states.shape
    return tokens if states.dtype == torch.float32 else max(1, SCRATCH // (batch * heads * size))


def _in_float(states: Tensor) -> Iterator[Tensor]:
    """Keys or values (B, H, K, D) in float32, `_step` tokens at a time, each valid until the next."""
    for part in states.split(_step(states), dim=2):
        if states.dtype == torch.float32:
            yield part
            continue
        if getattr(_memory, "scratch", part[..., :0]).numel() < part.numel():
            _memory.scratch = torch.empty(max(SCRATCH, part.numel()), dtype=torch.float32)
        yield _memory.scratch[: part.numel()].view(part.shape).copy_(part)


_memory = threading.local()


def _eager(module: Any, *args: Any, **more: Any) -> Any:
    """The model's own eager attention, from the file of its attention module."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **more)  # type: ignore[attr-defined]


def _register() -> None:
    for name, attend, write in ((SDPA, sdpa_attention_forward, sdpa_mask), (EAGER, _eager, eager_mask)):
        AttentionInterface.register(name, lambda *args, attend=attend, **more: _attend(attend, *args, **more))
        AttentionMaskInterface.register(name, lambda write=write, **arguments: _mask(write, **arguments))


_register()
