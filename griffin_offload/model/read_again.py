"""A KV cache for reading the last tokens of a prompt again: it shows a prompt's cache as it was before them, and leaves
it as it is.

B batch, H key and value heads, T tokens of the prompt, N of them read again, D head size."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .cache_layers import RoomyLayer, SlidingLayer
from .recurrent import KeepsStates


class EarlierCache(Cache):  # type: ignore[misc]
    """The cache of a prompt as it was before its last tokens."""


def readable_again(cache: Any) -> int | str:
    """How many of its last tokens the cache of a prompt lets be read again, or in words why none."""
    keys = RoomyLayer, SlidingLayer
    if kinds := [layer for layer in cache.layers if isinstance(layer, KeepsStates) or not isinstance(layer, keys)]:
        return f"its cache holds more than keys and values ({type(kinds[0]).__name__})"
    # A layer that never ran borrows another one's keys.
    most = [layer.readable_again for layer in cache.layers if layer.is_initialized]
    return min(most, default=0) or "its sliding windows hold nothing before the last tokens"


def before_the_last(cache: Any, count: int) -> EarlierCache:
    """For one forward over the last N tokens of a prompt, at most as many as `readable_again` says."""
    return EarlierCache(layers=[_EarlierLayer(layer, count) for layer in cache.layers])


class _EarlierLayer(DynamicLayer):  # type: ignore[misc]
    """Gives (B, H, K + N, D): the K tokens that the prompt's layer held before, then the new ones, which it forgets."""

    def __init__(self, layer: Any, count: int) -> None:
        super().__init__()
        self.is_sliding = layer.is_sliding
        self._tokens = self._first = 0
        if layer.is_initialized:
            keys, values, self._first = layer.held()
            self._tokens = self._first + keys.shape[2] - count
            self._before = keys[:, :, :-count], values[:, :, :-count]

    def get_seq_length(self) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens - self._first + query_length, self._first

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._before
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
