"""Rotary embeddings whose frequencies depend on how many tokens there are: dynamic NTK and longrope.

transformers takes the longest of a batch for all of its rows, and keeps what the last prompt left behind. Here each
row has the frequencies of its own length, so that a prompt is read in a batch as it is alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from .config_facts import rope_changes

READ_AGAIN = ("phi3", "phimoe")  # types that read all again with the long factors where an answer reaches them
# Tokens that each row will have at the end of its answer, where longrope is to be chosen by that.
_REACH: ContextVar[Sequence[int]] = ContextVar("reach", default=())


def give_rows_their_own_length(model: Any) -> None:
    """Replaces the forward of rotary embeddings that change with the length."""
    if rope_changes(model.config):
        for module in model.modules():
            if hasattr(module, "rope_type") and hasattr(module, "original_max_seq_len"):
                module.forward = _OwnLength(module)


def switch_length(config: Any) -> int | None:
    """After how many tokens transformers reads a whole text again, with longrope's long factors; None: never."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in READ_AGAIN or rope.get("rope_type") != "longrope":
        return None
    length = getattr(config, "original_max_position_embeddings", None)
    return None if length is None else int(length)


@contextmanager
def no_switch(model: Any) -> Iterator[None]:
    """Nothing is read again in this block: what would be read again by is not resident. `reaching` says instead which
    rows begin with the long factors."""
    if switch_length(model.config) is None:
        yield
        return
    model.prepare_inputs_for_generation = partial(GenerationMixin.prepare_inputs_for_generation, model)
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


@contextmanager
def reaching(lengths: Sequence[int]) -> Iterator[None]:
    """Rows of these lengths at the end of their answers have longrope's factors for that from the start."""
    token = _REACH.set(lengths)
    try:
        yield
    finally:
        _REACH.reset(token)


class _OwnLength:
    """The forward of a rotary embedding: (x (B, T, D), position_ids (B, T)) -> cos and sin, (B, T, d) each."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._forward = module.forward
        types = module.rope_type.values() if isinstance(module.rope_type, dict) else [module.rope_type]
        self._is_dynamic = any("dynamic" in str(each) for each in types)

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if position_ids.ndim != 2:
            return self._forward(x, position_ids, *args, **kwargs)
        lengths = [int(last) + 1 for last in position_ids.amax(-1).tolist()]
        reach = () if self._is_dynamic else _REACH.get()
        if len(reach) == len(lengths):
            lengths = [max(pair) for pair in zip(lengths, reach, strict=True)]
        parts: list[Any] = [None] * len(lengths)
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            found = self._of_length(length, x, position_ids[rows], *args, **kwargs)
            for place, row in enumerate(rows):
                parts[row] = [each[place : place + 1] for each in found]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def _of_length(self, length: int, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The embedding of rows of `length` tokens, whatever came before."""
        module = self._module
        if self._is_dynamic:
            for name, value in [*vars(module).items(), *module._buffers.items()]:
                if name.endswith("original_inv_freq"):
                    module._buffers[name.replace("original_inv_freq", "inv_freq")] = value.clone()
                elif name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
        last = torch.full_like(position_ids[:, :1], length - 1)
        found = self._forward(x, torch.cat([position_ids, last], dim=1), *args, **kwargs)
        return [each[:, :-1] for each in found]
