"""The KV cache while an answer is decoded by a static step: keys and values at fixed addresses.

A fixed layer is a view of the memory of a layer of cache_layers.py. The place of the next token is a tensor on the
device, so that the same kernels with the same arguments do the work of every token.
B batch, H key and value heads, S slots, D head size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_layers import InRoom, SlidingLayer
from .recurrent import KeepsStates


class Ring:
    """Where the tokens of a sliding window lie: token t in slot t % S. Tensors that `move` changes in place.

    `slot` (1,): of the next token; `offset` (S,): the token that a slot holds, less the slot. A slot without a token
    counts as one for a token that is still to come, which no mask shows. Both int64."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots = torch.arange(slots, device=device)
        self.slot, self.offset = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros_like(self._slots)

    def move(self, position: Tensor) -> None:
        """`position` (), int64: the next token's number."""
        count = len(self._slots)
        token = position - torch.remainder(position - self._slots, count)
        self.slot.copy_(torch.remainder(position, count).view(1))
        self.offset.copy_(torch.where(token < 0, token + count, token) - self._slots)


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (B, H, S, D), of which the first `position` tokens are filled; or a ring of them."""

    is_compileable = True  # so that transformers always writes a mask

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, ring: Ring | None, is_sliding: bool) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized, self.is_sliding = keys, values, True, is_sliding
        self._position, self._ring = position, ring
        self._slot = ring.slot if ring else position.view(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._slot, key_states)
        self.values.index_copy_(2, self._slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        return self.keys.shape[2], self._ring.offset if self._ring else 0

    def get_seq_length(self) -> Any:
        return self._position

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


def not_fixed(cache: Cache) -> str:
    """Why a prompt's cache cannot become a fixed one; '' if it can."""
    each = [(layer, isinstance(layer, InRoom) and not isinstance(layer, KeepsStates)) for layer in cache.layers]
    kinds = [type(layer).__name__ for layer, can in each if not can or not layer.slots]
    return f"its cache has layers of another kind ({kinds[0]})" if kinds else ""


def fixed_cache(cache: Cache, tokens: int, position: Tensor, rings: Mapping[int, Ring]) -> Cache:
    """Views of a prompt's cache that has been laid in `rings`, with room for `tokens` tokens."""
    layers = []
    for layer in cache.layers:
        slots = min(tokens, layer.slots)
        sliding = isinstance(layer, SlidingLayer)
        ring = rings.get(slots) if sliding and layer.slides else None
        keys, values = layer.memory(slots)
        layers.append(FixedLayer(keys, values, position, ring, sliding))
    return Cache(layers=layers)


def rings_of(cache: Cache, device: torch.device) -> dict[int, Ring]:
    """Lays the tokens of every layer that will slide in a ring. Returns the rings by their slots."""
    rings: dict[int, Ring] = {}
    for layer in cache.layers:
        if isinstance(layer, SlidingLayer) and layer.slides:
            layer.lay_in_ring()
            rings[layer.slots] = rings.get(layer.slots) or Ring(layer.slots, device)
    return rings
