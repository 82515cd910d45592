"""The KV cache of one run, allocated once for as many tokens as the plan says.

Between two turns of a conversation a cache can be cut back to its first tokens, and moved to memory for more of them, a
layer at a time. Its layers are those of cache_layers.py."""

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ..memory.cuda import give_back
from .cache_layers import InRoom, Room, RoomyLayer, SlidingLayer, StateAndKeysLayer, capacity
from .recurrent import KeepsStates, StateLayer

KEYS = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)


def windows(config: Any) -> tuple[int | None, ...]:
    """For each layer its sliding window in tokens, or None, as transformers has it."""
    return tuple(getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)


def make_cache(
    config: Any, tokens: int, row: int, device: str, sequences: int = 1, devices: Sequence[str] = ()
) -> Cache:
    """A cache for `tokens` tokens of each sequence, which it knows as its `tokens`. `row`: the most bytes of a token's
    keys (or values) in a layer. `devices`: of each layer, where they are not all on one `device`.

    Layers of kinds that `why_not_kept` names are not replaced."""
    cache = DynamicCache(config=config)
    cache.tokens = tokens
    for index, (layer, window) in enumerate(zip(cache.layers, windows(config), strict=True)):
        if type(layer) is LinearAttentionLayer:
            cache.layers[index] = StateLayer(layer.number_of_states)
        elif type(layer) in KEYS:
            room = Room(capacity(tokens, window), row, sequences, devices[index] if devices else device)
            if type(layer) is LinearAttentionAndFullAttentionLayer:
                cache.layers[index] = StateAndKeysLayer(layer.number_of_states, room)
            else:
                cache.layers[index] = SlidingLayer(window, room) if window else RoomyLayer(room)
    return cache


def why_not_kept(config: Any, state_bytes: int | None) -> str:
    """Why a model's cache cannot be cut back to any of its earlier tokens; '' if it can. `state_bytes`: see
    recurrent.follow_states."""
    layers = DynamicCache(config=config).layers
    kinds = [type(layer).__name__ for layer in layers if type(layer) not in (*KEYS, LinearAttentionLayer, DummyLayer)]
    if not kinds and state_bytes is None:
        kinds = ["a recurrent state that is not known"]
    return f"its cache holds more than keys and values ({kinds[0]})" if kinds else ""


def why_no_crop(config: Any) -> str:
    """Why the last tokens of a model's cache cannot be taken back, however many; '' if they can."""
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    others = [kind.__name__ for kind in kinds if kind not in (DynamicLayer, DynamicSlidingWindowLayer)]
    return f"its cache holds more than keys and values ({others[0]})" if others else ""


def used_layers(cache: Any) -> list[Any]:
    """The layers that hold something; some models let a layer look at another one's."""
    keys = [layer for layer in cache.layers if isinstance(layer, InRoom) and layer.is_initialized]
    return keys + [layer for layer in cache.layers if isinstance(layer, StateLayer)]


def mark(cache: Any, *tokens: int) -> None:
    """Recurrent states are to be kept as they are after so many tokens."""
    for layer in cache.layers:
        if isinstance(layer, KeepsStates):
            layer.marks = tuple(sorted(tokens))


def kept_points(cache: Any) -> set[int] | None:
    """The numbers of tokens that a cache with recurrent states can be cut back to; None: it has none, and can be cut
    back to any number that `has_first` allows."""
    points = [set(layer.points) for layer in cache.layers if isinstance(layer, KeepsStates)]
    return set.intersection(*points) if points else None


def held_tokens(cache: Any) -> int:
    """The tokens that every layer has been given: an interrupted forward leaves some with one less."""
    with_keys = [layer for layer in used_layers(cache) if not isinstance(layer, StateLayer)]
    return min((int(layer.get_seq_length()) for layer in with_keys), default=0)


def has_first(cache: Any, tokens: int) -> bool:
    """Whether all that the next token needs is still there once a cache is cut back to its first `tokens`."""
    return all(layer.has_first(tokens) for layer in used_layers(cache))


def most_undone(cache: Any) -> int:
    """How many of the last tokens can be taken back by the cache's `crop`, whatever came before them."""
    return min((layer.undoable for layer in used_layers(cache)), default=0)


def cut_back(cache: Any, tokens: int, room: int, devices: Sequence[str] = ()) -> None:
    """Keeps the first `tokens` tokens, in memory for `room`: a layer at a time, so that little is held twice. Layer i
    moves to devices[i], where they are on several."""
    for layer, device in zip(cache.layers, devices or [""] * len(cache.layers), strict=True):
        if device and isinstance(layer, InRoom | StateLayer):
            layer.move(device)
        if isinstance(layer, InRoom | StateLayer):
            layer.cut_back(tokens, room)
        if isinstance(layer, InRoom) and layer.is_initialized:
            give_back(layer.keys.device.type)  # or a GPU's blocks of all layers would be kept for later
    cache.tokens = room
