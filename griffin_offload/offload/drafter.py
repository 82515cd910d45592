"""Drafts tokens by the resident model for transformers' assisted decoding, which has the full model verify them.

    text -> drafts (resident model, one by one) -> one pass of the full model over all of them -> accepted tokens

Drafts extend the live KV cache and are taken back before the pass, which writes the full model's keys and values. A
token is drawn as the full model's will be, from logits that went through the same processors, so that the rejection
rule of transformers keeps the full model's distribution exactly. Where the end of the text stands in it before, the
tokens that followed there run through the resident model together: as long as it draws the same ones, they are drafts.
B = 1 batch, T tokens, V vocabulary."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    _prepare_attention_mask,
    _prepare_position_ids,
    _prepare_token_type_ids,
)

from ..model.kv_cache import most_undone
from ..model.skeleton import Skeleton
from ..planning.lossless import DROPPED, EXPECTED, MEMORY, STREAM, Lossless
from ..planning.plan import Plan
from .draft_length import DraftLength
from .layer_hook import LayerHook
from .layer_stream import LayerStream
from .sweep import Sweep

NGRAM, LOOKED_UP = 3, 8  # tokens that must stand in the text before; that are then tried together


class Drafter(CandidateGenerator):  # type: ignore[misc]
    """For one answer. `attached` puts it in the place of transformers' own candidate generators."""

    requires_model_outputs = True
    model_kwargs_overrides: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self, skeleton: Skeleton, plan: Plan, open_stream: Callable[[], LayerStream], repeats: bool = False
    ) -> None:
        """`open_stream`: of all layers, called once, when the prompt has passed. `repeats`: another run with the same
        seed is to draw the same tokens, so that no clock decides how many are drafted."""
        self._model, self._plan, self._open_stream = skeleton.model, plan, open_stream
        self._eps = torch.finfo(skeleton.layout.dtype).eps if skeleton.layout.dtype != torch.float32 else 0.0
        self._stream: LayerStream | None = None
        self._sweep: Sweep | None = None
        self._processor: Any = None
        self._samples, self._max_length = False, 0
        self._ends: set[int] = set()
        self._probabilities: list[float] = []  # of the drafts at hand
        self._draft_s, self._armed = 0.0, 0.0
        self._looked_up = 0
        expected = DROPPED if plan.rest == "drop" else EXPECTED
        draft_s, pass_s = plan.bytes_per_token / MEMORY, plan.streamed_bytes / STREAM
        self._length = DraftLength(plan.drafts, expected, draft_s, pass_s, clock=not repeats)
        self.done = Lossless(pass_bytes=plan.streamed_bytes)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it is open, the model's assisted decoding drafts by this."""
        prepare = self._model.prepare_inputs_for_generation

        @wraps(prepare)  # whose signature transformers looks at
        def only_new(ids: Tensor, next_sequence_length: int | None = None, **more: Any) -> Any:
            """transformers' assisted decoding would give the first pass tokens that the cache holds already."""
            held = int(more["past_key_values"].get_seq_length())
            if next_sequence_length is None and held:
                next_sequence_length = ids.shape[1] - held
            return prepare(ids, next_sequence_length=next_sequence_length, **more)

        self._model._get_candidate_generator = self._begin
        self._model.prepare_inputs_for_generation = only_new
        try:
            yield
        finally:
            del self._model._get_candidate_generator
            del self._model.prepare_inputs_for_generation
            self._close_pass()
            if self._stream:
                self._stream.free()

    def _begin(self, *, generation_config: Any, logits_processor: Any, **_: Any) -> "Drafter":
        ends = getattr(generation_config, "_eos_token_tensor", None)
        self._ends = set() if ends is None else set(ends.flatten().tolist())
        self._processor, self._samples = logits_processor, bool(generation_config.do_sample)
        self._max_length = int(generation_config.max_length)
        return self

    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """The text (1, T) and drafts behind it, and their logits (1, k, V) where tokens are sampled. The next forward
        is the full model's."""
        self._probabilities, self._draft_s = [], 0.0
        if is_first_iteration:  # of the prompt, whose pass was made ready already
            return input_ids, None
        self._close_pass()
        start = time.perf_counter()
        cache, length = model_kwargs["past_key_values"], input_ids.shape[1]
        most = min(self._plan.drafts, most_undone(cache) - 1, self._max_length - length - 1)
        ids, logits = self._draft(input_ids, model_kwargs, most) if most > 0 else (input_ids, [])
        self._armed = time.perf_counter()
        self._draft_s = self._armed - start
        self._stream = self._stream or self._open_stream()
        self._sweep = Sweep(self._stream, LayerHook())
        self._sweep.__enter__()
        return ids, torch.stack(logits, dim=1) if logits and self._samples else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """After a pass: the text with what was accepted, the full model's logits (1, k + 1, V), and how many drafts."""
        if self._sweep is None:
            return
        seconds, accepted = time.perf_counter() - self._armed, int(num_matches)
        self._length.learn(self._probabilities, accepted, self._draft_s, seconds)
        done = self.done
        self.done = replace(
            done,
            passes=done.passes + 1,
            drafted=done.drafted + len(self._probabilities),
            accepted=done.accepted + accepted,
            failed=done.failed + (accepted < len(self._probabilities)),
            looked_up=self._looked_up,
            draft_s=done.draft_s + self._draft_s,
            verify_s=done.verify_s + seconds,
            close=done.close + (self._close(scores[0, : accepted + 1]) if self._eps and not self._samples else 0),
        )

    def _close(self, logits: Tensor) -> int:
        """How many rows' two likeliest tokens (N, V) the rounding of the dtype can exchange."""
        first, second = logits.topk(2).values.unbind(-1)
        return int((first - second <= self._eps * first.abs()).sum())

    def _close_pass(self) -> None:
        if self._sweep:
            self._sweep.__exit__()
            self._sweep = None

    def _draft(self, text: Tensor, model_kwargs: dict[str, Any], most: int) -> tuple[Tensor, list[Tensor]]:
        """The text with at least one draft behind it, and the logits (1, V) that each was drawn from. The cache is as
        it was."""
        cache = model_kwargs["past_key_values"]
        held = int(cache.get_seq_length())
        ids, logits, survival = text, list[Tensor](), 1.0
        goes_on = True
        while goes_on:
            drafted = ids.shape[1] - text.shape[1]
            guess = _look_up(ids[0], min(LOOKED_UP, most - drafted - 1))
            known = ids.shape[1]
            rows = self._forward(torch.cat([ids, guess[None]], dim=1), len(guess) + 1, model_kwargs)
            for number in range(len(guess) + 1):
                scores = self._processor(ids, rows[:, number].to(torch.float32, copy=True))
                token, probability = self._draw(scores)
                ids = torch.cat([ids, token], dim=1)
                if self._samples:
                    logits.append(scores)
                self._probabilities.append(probability)
                survival *= self._length.acceptance(probability)
                goes_on = (
                    len(self._probabilities) < most and int(token) not in self._ends and self._length.goes_on(survival)
                )
                same = number < len(guess) and int(token) == int(guess[number])
                self._looked_up += same
                if not goes_on or not same:
                    break
            cache.crop(-max(0, known + len(guess) - ids.shape[1] + 1))  # those that were looked up in vain
        cache.crop(-(int(cache.get_seq_length()) - held))
        return ids, logits

    def _draw(self, scores: Tensor) -> tuple[Tensor, float]:
        """Logits (1, V) -> a token (1, 1), as the full model's will be drawn, and its probability."""
        probabilities = scores.softmax(-1)
        token = torch.multinomial(probabilities, 1) if self._samples else scores.argmax(-1, keepdim=True)
        return token, float(probabilities[0, token])

    def _forward(self, ids: Tensor, count: int, model_kwargs: dict[str, Any]) -> Tensor:
        """Logits (1, count, V) of the last tokens of a text (1, T), whose others the cache holds."""
        own = _prepare_attention_mask(copy.copy(model_kwargs), ids.shape[1], False)
        own = _prepare_token_type_ids(own, ids.shape[1])
        own = _prepare_position_ids(own, ids.shape[1], False)
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=count, is_first_iteration=False, **own
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        logits: Tensor = self._model(**inputs).logits
        return logits[:, -count:]


def _look_up(text: Tensor, most: int) -> Tensor:
    """A text (T,) -> at most so many tokens that followed where its last tokens stand last before."""
    if most < 1 or len(text) <= NGRAM:
        return text[:0]
    places = (text[:-1].unfold(0, NGRAM, 1) == text[-NGRAM:]).all(1).nonzero()
    if not len(places):
        return text[:0]
    begin = int(places[-1]) + NGRAM
    return text[begin : begin + most]
