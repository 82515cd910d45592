"""The KV cache of one run, allocated once for as many tokens as the plan says.

transformers' dynamic layers concatenate token by token, which copies the whole cache every time and leaves holes in the
heap. These layers return the same tensors. B batch, H key and value heads, T tokens, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..memory.arena import Arena, padded

READ_AGAIN = 64  # tokens at the end of a prompt that can be read again, at most


def capacity(tokens: int, window: int | None) -> int:
    """Tokens that a layer has room for. A sliding one moves its window to the front at the end, so it needs two."""
    return min(tokens, 2 * window) if window else tokens


def windows(config: Any) -> tuple[int | None, ...]:
    """For each layer its sliding window in tokens, or None, as transformers has it."""
    return tuple(getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)


def make_cache(config: Any, tokens: int, row: int, device: str, sequences: int = 1) -> Cache:
    """A cache for `tokens` tokens of each sequence, which it knows as its `tokens`. `row`: the most bytes of a token's
    keys (or values) in a layer.

    Layers other than transformers' plain and sliding ones are not replaced."""
    cache = DynamicCache(config=config)
    cache.tokens = tokens
    rooms = [capacity(tokens, window) for window in windows(config)]
    arena = Arena(sum(2 * padded(room * row * sequences) for room in rooms), device, huge=False)
    for index, (layer, room) in enumerate(zip(cache.layers, rooms, strict=True)):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = SlidingLayer(layer.sliding_window, room, sequences, arena)
        elif type(layer) is DynamicLayer:
            cache.layers[index] = RoomyLayer(room, sequences, arena)
    return cache


class _Room:
    """Keys and values (B, H, room, D); the first tokens are in use."""

    def __init__(self, room: int, sequences: int, arena: Arena) -> None:
        self.room = room
        self._sequences = sequences
        self._arena: Arena | None = arena
        self._keys = self._values = torch.empty(0)

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Allocates for states like these (B, H, T, D): from the arena, unless the batch is not the planned one."""
        for name, states in (("_keys", keys), ("_values", values)):
            shape = (*states.shape[:2], self.room, states.shape[3])
            if self._arena and len(states) == self._sequences:
                memory = self._arena.take(shape, states.dtype)
            else:
                memory = torch.empty(shape, dtype=states.dtype, device=states.device)
            setattr(self, name, memory)
        self._arena = None

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self._keys[:, :, :tokens], self._values[:, :, :tokens]

    def put(self, keys: Tensor, values: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Writes states at token `at`; returns all tokens up to their end."""
        end = at + keys.shape[2]
        self._keys[:, :, at:end] = keys
        self._values[:, :, at:end] = values
        return self._keys[:, :, :end], self._values[:, :, :end]


class InRoom:
    """A layer whose tokens lie in memory that was allocated for all of them."""

    _room: _Room

    @property
    def slots(self) -> int:
        """Tokens that attention ever looks at together; 0 where the room was too small."""
        return self._room.room

    def memory(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `tokens` tokens of the room, filled or not: (B, H, tokens, D)."""
        return self._room.first(tokens)

    def held(self) -> tuple[Tensor, Tensor, int]:
        """Keys and values of all tokens that are still here, in order, and the number of the first."""
        raise NotImplementedError

    @property
    def readable_again(self) -> int:
        """The last tokens before which all is still here that they look back at."""
        raise NotImplementedError


class RoomyLayer(InRoom, DynamicLayer):  # type: ignore[misc]
    """A layer that keeps every token. Without room left it becomes transformers' own."""

    def __init__(self, room: int, sequences: int, arena: Arena) -> None:
        super().__init__()
        self._room = _Room(room, sequences, arena)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room.take(key_states, value_states)
        used = self.get_seq_length()
        if used + key_states.shape[2] > self._room.room:
            self._room.room = 0
            full: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return full
        self.keys, self.values = self._room.put(key_states, value_states, used)
        return self.keys, self.values

    def held(self) -> tuple[Tensor, Tensor, int]:
        return self.keys, self.values, 0

    @property
    def readable_again(self) -> int:
        return min(READ_AGAIN, int(self.get_seq_length()))


class SlidingLayer(InRoom, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that keeps the last window - 1 tokens, and a few before them as long as there is room."""

    is_croppable = False  # what left the window may be gone

    def __init__(self, window: int, room: int, sequences: int, arena: Arena) -> None:
        super().__init__(sliding_window=window)
        self._room = _Room(room, sequences, arena)
        self._end = 0  # of the tokens in the room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room.take(key_states, value_states)
        kept, new = self.sliding_window - 1, key_states.shape[2]
        self.cumulative_length += new
        if self._end + new > self._room.room:
            return self._start_again(key_states, value_states, kept)
        keys, values = self._room.put(key_states, value_states, self._end)
        begin = max(0, self._end - kept)
        self._end += new
        self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]
        return keys[:, :, begin:], values[:, :, begin:]

    @property
    def slides(self) -> bool:
        """Whether there will be more tokens than the window has."""
        return self._room.room > int(self.sliding_window)

    @property
    def slots(self) -> int:
        return min(self._room.room, int(self.sliding_window))

    def lay_in_ring(self) -> None:
        """Moves token t to slot t % window. From then on only views of the memory are used."""
        count = self.keys.shape[2]
        slots = torch.arange(self.cumulative_length - count, self.cumulative_length, device=self.keys.device)
        for memory, states in zip(self.memory(self.slots), (self.keys, self.values), strict=True):
            memory[:, :, slots % self.slots] = states.clone()

    def _start_again(self, key_states: Tensor, value_states: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Moves the last tokens to the front: the room is full, or a prompt is longer than it."""
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        more = kept + min(READ_AGAIN, kept // 2, self._room.room - kept)
        held_keys, held_values = self._room.put(keys[:, :, -more:], values[:, :, -more:], 0)
        self.keys, self.values = held_keys[:, :, -kept:], held_values[:, :, -kept:]
        self._end = held_keys.shape[2]
        return keys, values

    def held(self) -> tuple[Tensor, Tensor, int]:
        return *self._room.first(self._end), self.cumulative_length - self._end

    @property
    def readable_again(self) -> int:
        if self._end == self.cumulative_length:
            return min(READ_AGAIN, self._end)
        return min(READ_AGAIN, self._end - int(self.sliding_window) + 1)
