"""Measures on a prompt how close its resident model is to the full one.

The prompt pass leaves the full model's final hidden states of the prompt's last tokens here. Before the second token of
the answer, the resident model reads the same tokens again, behind the keys and values that the full model left; the
lm_head makes logits of both, a few tokens at a time. The answer's cache stays as it is.
B batch, T tokens of the prompt, N of them read again, D hidden."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..model.read_again import EarlierCache, before_the_last, readable_again
from ..model.skeleton import Skeleton
from ..pruning.fidelity import FEWEST, ROOM, Fidelity, compare, mean_fidelity

BY_TOKEN = ("input_ids", "position_ids", "cache_position")  # arguments of a forward (..., T); a mask is for all tokens


@dataclass(frozen=True)
class _Prompt:
    """What a prompt's forward left: the `arguments` of the model's decoder, its output for the last N tokens, and how
    many tokens there were (of a batch on average, without padding)."""

    cache: Any
    arguments: Mapping[str, Any]
    output: Any
    tokens: float


class FidelityMeter:
    """Acts on the forwards of `generate`. Use as a context manager around it.

    `tokens`: how many are read again at most. `prompts`: how many forwards are those of a prompt."""

    def __init__(self, skeleton: Skeleton, tokens: int, prompts: int = 1) -> None:
        self._skeleton, self._tokens, self._left = skeleton, tokens, prompts
        self._decoder = _decoder(skeleton)
        self._names = list(signature(self._decoder.forward).parameters)
        self._waiting: dict[int, _Prompt] = {}  # by the cache
        self._figures: list[Tensor] = []
        self._lengths: list[float] = []  # of the prompts that these are of
        self._why_not, self.seconds = "the answer has one token, which is the full model's", 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> "FidelityMeter":
        self._handles = [
            self._decoder.register_forward_hook(self._passed, with_kwargs=True),
            self._skeleton.model.register_forward_pre_hook(self._begins, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._waiting.clear()

    def result(self) -> Fidelity:
        if not self._figures:
            return Fidelity(why_not=self._why_not)
        if sum(len(each) for each in self._figures) < FEWEST:
            return Fidelity(why_not="one token tells too little")
        return mean_fidelity(self._figures, sum(self._lengths) / len(self._lengths), self.seconds)

    def _passed(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """After the decoder: of a prompt, keep the output for the last tokens."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache, ids = given.get("past_key_values"), given.get("input_ids")
        if not self._left or isinstance(cache, EarlierCache):
            return
        self._left -= 1
        known = (*BY_TOKEN, "attention_mask")
        unknown = [name for name, each in given.items() if isinstance(each, Tensor) and name not in known]
        if cache is None or ids is None or unknown:
            self._why_not = f"{type(module).__name__} is given {unknown or 'no cache'}"
            return
        most = readable_again(cache)
        if isinstance(most, str):
            self._why_not = most
            return
        count = min(self._tokens, most)
        arguments = {
            name: each[..., -count:] if name in BY_TOKEN and each is not None else each for name, each in given.items()
        }
        kept = type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:, -count:].clone()})
        mask = given.get("attention_mask")
        tokens = ids.shape[1] if mask is None else float(mask.sum()) / len(mask)
        self._waiting[id(cache)] = _Prompt(cache, arguments, kept, tokens)

    def _begins(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Before a forward: of the answer's second token, measure first."""
        prompt = self._waiting.pop(id(kwargs.get("past_key_values")), None)
        if prompt is not None:
            self._measure(prompt)

    @torch.no_grad()
    def _measure(self, prompt: _Prompt) -> None:
        full = prompt.output.last_hidden_state
        cache = before_the_last(prompt.cache, full.shape[1])
        with _moment(self._skeleton) as begin, self._skeleton.threads.fitted(full.shape[:2].numel()):
            again = self._decoder(**{**prompt.arguments, "past_key_values": cache}).last_hidden_state
            counts = _counts(prompt.arguments.get("attention_mask"), full)
            figures = self._compare(prompt.output, full[counts], again[counts])
        self.seconds += time.perf_counter() - begin[0]
        if figures.isfinite().all():
            self._figures.append(figures)
            self._lengths.append(prompt.tokens)
        else:
            self._why_not = "the resident model's predictions are not finite"

    def _compare(self, output: Any, full: Tensor, resident: Tensor) -> Tensor:
        """States (N, D) of the full and of the resident model -> figures (N, 3)."""
        at_once = max(1, ROOM // self._skeleton.config.vocab_size)
        parts = zip(full.split(at_once), resident.split(at_once), strict=True)
        return torch.cat([compare(self._logits(output, f), self._logits(output, r)) for f, r in parts]).cpu()

    def _logits(self, output: Any, states: Tensor) -> Tensor:
        """The logits (P, V) that the model makes of its decoder's states (P, D), by its own code."""
        states = states[None]
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with _answers(self._decoder, type(output)(**{**output, "last_hidden_state": states})):
            logits: Tensor = self._skeleton.model(input_ids=ids, use_cache=False).logits
        return logits[0]


def _decoder(skeleton: Skeleton) -> Any:
    """The module that makes the states that the lm_head takes. Some models call only a part of their base model."""
    found = skeleton.model.get_decoder()
    return found if skeleton.modules[0] in list(found.modules()) else skeleton.model.base_model


def _counts(mask: Tensor | None, states: Tensor) -> Tensor:
    """Which of the last tokens are no padding: (B, N), bool."""
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask[:, -states.shape[1] :].bool()


@contextmanager
def _answers(module: Any, output: Any) -> Iterator[None]:
    """While it is open, a module's forward gives this output."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _moment(skeleton: Skeleton) -> Iterator[list[float]]:
    """When the first layer really begins: in lock-step a forward waits there for the others' answers."""
    begin = [time.perf_counter()]
    handles: list[Any] = []

    def began(*_: Any) -> None:
        begin[0] = time.perf_counter()
        while handles:
            handles.pop().remove()

    handles += [child.register_forward_pre_hook(began) for child in skeleton.modules[0].children()]
    try:
        yield begin
    finally:
        with suppress(IndexError):
            handles.pop().remove()
