"""The layers of a KV cache: keys and values in memory that was allocated for all tokens.

transformers' dynamic layers concatenate token by token, which copies the whole cache every time and leaves holes in the
heap. These layers return the same tensors. B batch, H key and value heads, T tokens, D head size.

Ctrl-C may come at any moment: a layer that it found in the middle of a change says that it is not `whole`."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer

from ..memory.arena import Arena, padded
from .recurrent import KeepsStates

READ_AGAIN = 64  # tokens at the end of a prompt that can be read again, at most


def capacity(tokens: int, window: int | None) -> int:
    """Tokens that a layer has room for. A sliding one moves its window to the front at the end, or keeps a prompt's
    window beside the answer's, so it needs two."""
    return 2 * window if window and tokens > window else tokens


class Room:
    """Keys and values (B, H, room, D); the first tokens are in use, the others 0. (A static step also multiplies by
    tokens that are still to come, under a mask: 0 times what memory happens to hold may be NaN.)"""

    def __init__(self, room: int, row: int, sequences: int, device: str) -> None:
        self.room = room
        self._row, self._sequences, self._device = row, sequences, device
        self._arena: Arena | None = Arena(2 * padded(room * row * sequences), device, huge=False, zeros=True)
        self._keys = self._values = torch.empty(0)

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Allocates for states like these (B, H, T, D): from the arena, unless the batch is not the planned one."""
        for name, states in (("_keys", keys), ("_values", values)):
            shape = (*states.shape[:2], self.room, states.shape[3])
            if self._arena and len(states) == self._sequences:
                memory = self._arena.take(shape, states.dtype)
            else:
                memory = torch.zeros(shape, dtype=states.dtype, device=states.device)
            setattr(self, name, memory)
        self._arena = None

    def resized(self, room: int, tokens: int, begin: int = 0) -> "Room":
        """Another room with a copy of `tokens` tokens of this one, from the `begin` on."""
        other = Room(room, self._row, self._sequences, self._device)
        if self._keys.ndim == 4:
            other.take(self._keys, self._values)
            other.put(self._keys[:, :, begin : begin + tokens], self._values[:, :, begin : begin + tokens], 0)
        return other

    def move(self, device: str) -> None:
        """To another device."""
        if device == self._device:
            return
        self._device = device
        if self._arena:  # nothing is in it yet
            self._arena = Arena(self._arena.size, device, huge=False, zeros=True)
        self._keys, self._values = self._keys.to(device), self._values.to(device)

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

    _room: Room
    keys: Tensor
    is_initialized: bool

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

    def has_first(self, tokens: int) -> bool:
        """Whether the layer can be cut back to its first `tokens` tokens."""
        raise NotImplementedError

    def move(self, device: str) -> None:
        """To another device; `cut_back` is called next."""
        self._room.move(device)

    def cut_back(self, tokens: int, room: int) -> None:
        """Keeps the first `tokens` tokens, in memory for `room`."""
        raise NotImplementedError

    def saved(self) -> tuple[Tensor, Tensor, int] | None:
        """What `restore` makes the layer of again: keys and values (B, H, T, D) that are still here, and how many
        tokens it was given; None where it can be cut back to nothing."""
        raise NotImplementedError

    def restore(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Makes a new layer what another one was, whose `saved` this is."""
        raise NotImplementedError

    def fill(self, tokens: int) -> None:
        """Others have written tokens to the memory: from now on the first `tokens` of it count, where that can be."""
        raise NotImplementedError

    @property
    def readable_again(self) -> int:
        """The last tokens before which all is still here that they look back at."""
        raise NotImplementedError

    @property
    def undoable(self) -> int:
        """How many tokens, once they are added, `crop` can take back."""
        raise NotImplementedError


class RoomyLayer(InRoom, DynamicLayer):  # type: ignore[misc]
    """A layer that keeps every token. Without room left it becomes transformers' own."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self._room = room

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

    def has_first(self, tokens: int) -> bool:
        return 0 < tokens <= min(int(self.get_seq_length()), self._room.room)

    def cut_back(self, tokens: int, room: int) -> None:
        if room != self._room.room:
            self._room = self._room.resized(room, tokens)
        if self.is_initialized:
            self.fill(tokens)

    def saved(self) -> tuple[Tensor, Tensor, int] | None:
        tokens = int(self.get_seq_length())
        return (self.keys, self.values, tokens) if self.has_first(tokens) else None

    def restore(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        self.lazy_initialization(keys, values)
        self._room.take(keys, values)
        self.keys, self.values = self._room.put(keys, values, 0)

    def fill(self, tokens: int) -> None:
        self.keys, self.values = self._room.first(tokens)

    @property
    def readable_again(self) -> int:
        return min(READ_AGAIN, int(self.get_seq_length()))

    @property
    def undoable(self) -> int:
        return self._room.room


class StateAndKeysLayer(KeepsStates, RoomyLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer that keeps every token, and has a recurrent state."""

    def __init__(self, number_of_states: int, room: Room) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states)
        self._room = room
        self.begin()

    def has_first(self, tokens: int) -> bool:
        return self.has_state(tokens) and super().has_first(tokens)

    def move(self, device: str) -> None:
        self.move_state(device)
        super().move(device)

    def cut_back(self, tokens: int, room: int) -> None:
        self.back_to(tokens)
        super().cut_back(tokens, room)


class SlidingLayer(InRoom, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that keeps the last window - 1 tokens, and a few before them as long as there is room."""

    is_croppable = False  # what left the window may be gone
    cumulative_length: int

    def __init__(self, window: int, room: Room) -> None:
        super().__init__(sliding_window=window)
        self._room = room
        self._begin = 0  # of the tokens in the room: others use the front of it once it is a ring
        self._end = 0  # how many there are
        self._prompt = 0  # tokens that the layer may be cut back to: it keeps their window as long as it can
        self._whole = True
        self._verifies = False  # the prompt has passed, and drafts are verified: several tokens are no prompt

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room.take(key_states, value_states)
        self._whole = False
        kept, new = self.sliding_window - 1, key_states.shape[2]
        self.cumulative_length += new
        if self._end + new > self._room.room:
            keys, values = self._start_again(key_states, value_states, kept)
        else:
            keys, values = self._room.put(key_states, value_states, self._end)
            begin = max(0, self._end - kept)
            self._end += new
            self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]
            keys, values = keys[:, :, begin:], values[:, :, begin:]
        if new > 1 and not self._verifies:
            self._prompt, self._verifies = self.cumulative_length, self.record_past
        self._whole = True
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Without the window as a tensor, which nobody here reads: its way to a GPU would be waited for."""
        DynamicLayer.lazy_initialization(self, key_states, value_states)

    @property
    def slides(self) -> bool:
        """Whether there will be more tokens than the window has."""
        return self._room.room > int(self.sliding_window)

    @property
    def slots(self) -> int:
        return min(self._room.room, int(self.sliding_window))

    def lay_in_ring(self) -> None:
        """Moves token t to slot t % window. From then on only views of the memory are used. A copy of the tokens stays
        behind the ring, where there is room: the layer can be cut back to them."""
        count, begin = self.keys.shape[2], self.slots
        slots = torch.arange(self.cumulative_length - count, self.cumulative_length, device=self.keys.device)
        self._whole = False
        keys, values = self.keys.clone(), self.values.clone()
        for memory, states in zip(self.memory(begin), (keys, values), strict=True):
            memory[:, :, slots % begin] = states
        if begin + count <= self._room.room:
            self._room.put(keys, values, begin)
            self._begin, self._end, self._whole = begin, count, True

    def _start_again(self, key_states: Tensor, value_states: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Moves the last tokens to the front: the room is full, or a prompt is longer than it.

        In an answer these begin with the prompt's window, as long as there is room for all that came behind it."""
        new, held = key_states.shape[2], self._room.first(self._end)
        keys, values = (torch.cat(pair, dim=-2) for pair in zip(held, (key_states, value_states), strict=True))
        more = kept + self._spare
        since = self.cumulative_length - max(0, self._prompt - kept)
        if (new == 1 or self._verifies) and since <= self._room.room:
            more = max(more, since)
        held_keys, held_values = self._room.put(keys[:, :, -more:], values[:, :, -more:], 0)
        self.keys, self.values = held_keys[:, :, -kept:], held_values[:, :, -kept:]
        self._end = held_keys.shape[2]
        return keys[:, :, -(kept + new) :], values[:, :, -(kept + new) :]

    def held(self) -> tuple[Tensor, Tensor, int]:
        return *self._room.first(self._end), self._first

    @property
    def _first(self) -> int:
        """The number of the first token in the room."""
        return self.cumulative_length - self._end

    def has_first(self, tokens: int) -> bool:
        window_begins = max(0, tokens - self.sliding_window + 1)
        return self._whole and 0 < tokens <= self.cumulative_length and self._first <= window_begins

    def cut_back(self, tokens: int, room: int) -> None:
        self._whole = False
        end, size = max(0, tokens - self._first), capacity(room, self.sliding_window)
        if size != self._room.room or self._begin:
            self._room, self._begin = self._room.resized(size, end, self._begin), 0
        if self.is_initialized:
            self._show(tokens, end)
        self._verifies = self.record_past = False
        self._whole = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens: a negative number of them, as transformers gives it."""
        tokens = self.cumulative_length + tokens_to_remove
        if tokens_to_remove and self.is_initialized:
            if not self.has_first(tokens):
                raise RuntimeError(f"the window before token {tokens} has moved on")
            self._whole = False
            self._end, self.cumulative_length = tokens - self._first, tokens
            self._show_window()
            self._whole = True

    @property
    def undoable(self) -> int:
        return self._spare if self.slides else self._room.room

    @property
    def _spare(self) -> int:
        """Tokens before the window that stay, wherever there is room."""
        kept = int(self.sliding_window) - 1
        return min(READ_AGAIN, kept // 2, self._room.room - kept)

    def saved(self) -> tuple[Tensor, Tensor, int] | None:
        if not self._whole:
            return None
        keys, values = (states[:, :, self._begin :] for states in self._room.first(self._begin + self._end))
        return keys, values, self.cumulative_length

    def restore(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        self.lazy_initialization(keys, values)
        self._room.take(keys, values)
        self._room.put(keys, values, 0)
        self._show(tokens, keys.shape[2])

    def fill(self, tokens: int) -> None:
        if self._whole and not self._first and not self._begin and tokens <= self._room.room:
            self._whole = False
            self._show(tokens, tokens)
            self._whole = True

    def _show(self, tokens: int, end: int) -> None:
        """From now on the first `tokens` tokens count, of which the room holds the last `end`."""
        self._end, self.cumulative_length, self._prompt = end, tokens, tokens
        self._show_window()

    def _show_window(self) -> None:
        keys, values = self._room.first(self._end)
        self.keys, self.values = (states[:, :, -(self.sliding_window - 1) :] for states in (keys, values))

    @property
    def readable_again(self) -> int:
        if self._end == self.cumulative_length:
            return min(READ_AGAIN, self._end)
        return min(READ_AGAIN, self._end - int(self.sliding_window) + 1)
