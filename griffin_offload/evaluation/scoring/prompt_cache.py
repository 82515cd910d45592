"""Many continuations of one prompt: a KV cache that reads the prompt's keys and values and adds its own.

B batch, H key and value heads, P prompt tokens, T tokens of the continuation, D head size."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def can_fork(config: Any) -> bool:
    """Whether a model's cache is keys and values alone: no recurrent state, no index of its own."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


def prompt_cache() -> Cache:
    """A cache for a prompt that is forked later: every layer keeps all tokens, a sliding one too.

    transformers' masks apply the window to layers that hold more than it."""
    return DynamicCache()


def forked_cache(prompt: Cache, tokens: int, layers: int) -> Cache:
    """A cache for one forward that continues a prompt of `tokens` tokens, with as many rows as that forward has.

    `prompt` (one row, from `prompt_cache`) needs to hold layer i only once layer i of this forward runs, so that the
    forward may follow the prompt's own layer by layer. What this forward adds is not kept."""
    return Cache(layers=[_ForkedLayer(prompt, index, tokens) for index in range(layers)])


class _ForkedLayer(DynamicLayer):  # type: ignore[misc]
    """As long as the prompt from the start; gives (B, H, P + T, D): the prompt's for every row, then the new ones."""

    def __init__(self, prompt: Cache, index: int, tokens: int) -> None:
        super().__init__()
        self._prompt, self._index, self._tokens = prompt, index, tokens

    def get_seq_length(self) -> int:
        return self._tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self._prompt.layers[self._index]
        rows = len(key_states)
        keys = torch.cat([before.keys.expand(rows, -1, -1, -1), key_states], dim=2)
        values = torch.cat([before.values.expand(rows, -1, -1, -1), value_states], dim=2)
        return keys, values
