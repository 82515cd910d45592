"""Recurrent states in a cache: linear attention, Mamba, short convolutions.

Keys and values can be cut back to a prompt's first tokens; a state, which is of all tokens at once, cannot. So a layer
keeps copies of its state where it is told to: `marks` are the numbers of tokens to stop at. The module that changes the
state computes a prompt in parts, from mark to mark.
B batch, T tokens, D hidden."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from ..memory.arena import Arena, padded
from .architecture import Architecture

KEPT_STATES = 4  # copies that a conversation keeps: two in each of its last two turns
CACHE = ("cache_params", "past_key_values")  # what modules with a state call the cache, right after the hidden states


class KeepsStates:
    """Of a layer with conv_states and recurrent_states: how many tokens they are of, and copies of them."""

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    has_previous_state: dict[int, bool]
    lazy_initialization: Callable[..., None]

    def begin(self) -> None:
        """Nothing is kept yet."""
        self.marks: tuple[int, ...] = ()
        self._tokens: int | None = 0  # None: the state is in the middle of a change
        self._memory: list[list[Tensor]] = []
        self._copies: dict[int, list[Tensor]] = {}  # by the number of tokens

    def parts(self, tokens: int, by_token: bool) -> list[slice]:
        """The next `tokens` tokens of a pass, cut at the marks; `by_token`: and behind each one that has a state before
        it."""
        begin = self._tokens or 0
        ends = [mark - begin for mark in self.marks if begin < mark < begin + tokens]
        if by_token and (begin or ends):
            ends = list(range(1 if begin else ends[0], tokens))
        return [slice(*pair) for pair in zip([0, *ends], [*ends, tokens], strict=True)]

    def changes(self) -> int | None:
        """The state is about to change. Returns how many tokens it was of."""
        tokens, self._tokens = self._tokens, None
        return tokens

    def is_of(self, tokens: int) -> None:
        """The state is one of so many tokens now: copied, if that is a mark."""
        self._tokens = tokens
        if tokens in self.marks:
            self._copy(tokens)

    @property
    def points(self) -> list[int]:
        """The numbers of tokens that the layer can be cut back to."""
        return [*self._copies, *([self._tokens] if self._tokens else [])]

    def has_state(self, tokens: int) -> bool:
        return tokens in self.points

    def back_to(self, tokens: int) -> None:
        """Makes the state that of the first `tokens` tokens, and forgets the copies of more."""
        if tokens != self._tokens:
            self._tokens = None
            for state, copy in zip(self._states(), self._copies[tokens], strict=True):
                state.copy_(copy)
            self._tokens = tokens
        self._copies = {point: copy for point, copy in self._copies.items() if point <= tokens}

    def move_state(self, device: str) -> None:
        """To another device."""
        for states in (self.conv_states, self.recurrent_states):
            states |= {index: state.to(device) for index, state in states.items() if state is not None}

    def saved_states(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and facts (JSON types), that `restore_states` makes the layer of again."""
        kinds = {"conv_states": self.conv_states, "recurrent_states": self.recurrent_states}
        names = [(kind, i) for kind, states in kinds.items() for i, state in states.items() if state is not None]
        points = {**self._copies, **({self._tokens: self._states()} if self._tokens else {})}
        tensors = {
            f"{point}.{kind}.{i}": state
            for point, states in points.items()
            for (kind, i), state in zip(names, states, strict=True)
        }
        facts = {
            "names": names,
            "points": sorted(points),
            "copies": sorted(self._copies),
            "tokens": self._tokens,
            "previous": list(self.has_previous_state.values()),
        }
        return tensors, facts

    def restore_states(self, read: Callable[[str], Tensor], facts: Mapping[str, Any]) -> None:
        """Makes a new layer what another one was, whose `saved_states` these are; `read`: a tensor by its name."""
        for point in facts["points"]:  # the state that is not copied is that of the most tokens
            for kind, i in facts["names"]:
                state, own = read(f"{point}.{kind}.{i}"), getattr(self, kind)
                if own[i] is None:
                    self.lazy_initialization(**{kind: state, "state_idx": i})
                own[i].copy_(state)
            if point in facts["copies"]:
                self._copy(point)
        self.has_previous_state = dict(enumerate(facts["previous"]))
        self._tokens = facts["tokens"]

    def _states(self) -> list[Tensor]:
        both = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in both if state is not None]

    def _copy(self, tokens: int) -> None:
        """Copies the state, in place of the oldest copy if there is no room for another one."""
        states = self._states()
        if not self._memory:  # in memory of their own: blocks that stay would tear the heap into holes
            arena = Arena(KEPT_STATES * sum(padded(state.nbytes) for state in states), huge=False)
            self._memory = [[arena.take(state.shape, state.dtype) for state in states] for _ in range(KEPT_STATES)]
        if len(self._copies) == KEPT_STATES:
            del self._copies[min(self._copies)]
        taken = {id(copy) for copy in self._copies.values()}
        copy = next(memory for memory in self._memory if id(memory) not in taken)
        for memory, state in zip(copy, states, strict=True):
            memory.copy_(state)
        self._copies[tokens] = copy


class StateLayer(KeepsStates, LinearAttentionLayer):  # type: ignore[misc]
    """A layer that has a state, and no keys."""

    def __init__(self, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self.begin()

    def has_first(self, tokens: int) -> bool:
        return self.has_state(tokens)

    def move(self, device: str) -> None:
        self.move_state(device)

    def cut_back(self, tokens: int, room: int) -> None:
        self.back_to(tokens)


class Recurrence:
    """The forward of a module whose state layer `index` of the cache holds."""

    def __init__(self, module: nn.Module, index: int, by_token: bool) -> None:
        """`by_token`: it goes on from a state by one token alone."""
        self._forward, self._index, self._by_token = module.forward, index, by_token
        self._names = list(signature(module.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """States (B, T, D), the cache, and a mask (B, T) or None -> (B, T, D)."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        states, cache, mask = (given.pop(name, None) for name in (*self._names[:2], "attention_mask"))
        layer = cache.layers[self._index] if cache is not None else None
        if not isinstance(layer, KeepsStates):
            return self._forward(states, cache, attention_mask=mask, **given)
        out, masked = [], mask is not None and mask.shape[-1] == states.shape[1]
        for part in layer.parts(states.shape[1], self._by_token):
            before = layer.changes()
            own = mask[..., part] if masked else mask
            out.append(self._forward(states[:, part], cache, attention_mask=own, **given))
            if before is not None:
                layer.is_of(before + out[-1].shape[1])
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def follow_states(modules: Sequence[nn.Module], config: Any, entry: Architecture | None) -> int | None:
    """Gives the modules of decoder layers that have a recurrent state a forward that knows how many tokens it is of.

    Returns the bytes of all states of a sequence; None where a layer's module, the size of its state, or the model's
    type (no `entry`), is not known: code of another type may begin without the state."""
    cache, total = DynamicCache(config=config), 0
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        found = [child for child in modules[index].children() if _has_state(child)]
        if not entry or len(found) != 1:
            return None
        try:
            total += _state_bytes(found[0], cache, index, config.hidden_size)
        except (RuntimeError, NotImplementedError, TypeError):
            return None
        found[0].forward = Recurrence(found[0], index, entry.state_by_token)
    return total


def _has_state(module: nn.Module) -> bool:
    names = list(signature(module.forward).parameters)
    return len(names) > 1 and names[1] in CACHE and "attention_mask" in names


def _state_bytes(module: nn.Module, cache: DynamicCache, index: int, hidden: int) -> int:
    """What a sequence's state takes: of a forward without weights, which computes shapes alone."""
    dtype = next(module.parameters()).dtype
    meta = {name: buffer.to("meta") for name, buffer in module.named_buffers()}
    with torch.no_grad():
        functional_call(module, meta, (torch.empty(1, 8, hidden, dtype=dtype, device="meta"), cache))
    layer = cache.layers[index]
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return sum(padded(state.nbytes) for state in states if state is not None)
