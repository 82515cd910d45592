"""One prompt -> the events of its answer, on the engine."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..memory.heap import trim_heap
from ..memory.machine import held_memory
from ..report import Report
from ..text_stream import Token
from .asked import Ask, Request
from .grammar import Grammars
from .processors import Constrain, Logprob, Logprobs, Penalise
from .reply import Piece, Reply
from .served import Served


class Cancelled(KeyboardInterrupt):
    """Nobody waits for this answer any more. A KeyboardInterrupt is what ends an answer of the engine."""


@dataclass(frozen=True)
class Delta:
    """A part of an answer; `logprobs`: of its tokens. `index`: which answer of the request."""

    index: int
    piece: Piece
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of one answer. `reason`: stop, length or tool_calls; `thinking`: tokens of thinking; `first_s`: seconds
    to the first token."""

    index: int
    reason: str
    prompt_tokens: int
    tokens: int
    thinking: int
    first_s: float
    report: Report
    logprobs: tuple[Logprob, ...] = ()

    @property
    def cached(self) -> int:
        """Tokens of the prompt that an earlier request had computed."""
        return self.report.turn.kept_tokens if self.report.turn else 0


Event = Delta | Ended


class Responder:
    """Answers requests, one after the other, on one thread."""

    def __init__(self, served: Served) -> None:
        self._served, self._engine = served, served.engine
        self._grammars = Grammars(served.engine)

    def respond(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Raises Cancelled where `cancelled` says so, and what the engine raises."""
        for index, ask in enumerate(request.asks):
            yield from self._answer(index, ask, request, cancelled)

    def _answer(self, index: int, ask: Ask, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        start = time.perf_counter()
        answering = _Answering(ask, request)
        processors: list[Any] = []
        if ask.top_logprobs is not None:
            answering.logprobs = Logprobs(ask.top_logprobs, len(ask.prompt_ids))
            processors.append(answering.logprobs)
        if ask.penalties:
            processors.append(Penalise(ask.penalties, len(ask.prompt_ids)))
        if ask.schema is not None:
            self._load_grammars()
            processors.append(Constrain(self._grammars.make(ask.schema), len(ask.prompt_ids)))
        more = {"logits_processor": processors} if processors else {}

        def check(*progress: Any) -> None:
            if cancelled():
                raise Cancelled

        stream = self._engine.stream(
            ask.prompt_ids, ask.pruning, ask.decoding, continues=ask.reuse, on_layer=check, **more
        )
        first_s = 0.0
        with _checked(self._engine.skeleton.modules, check) as prompt_passed, stream:
            for token in stream:
                prompt_passed()
                first_s = first_s or time.perf_counter() - start
                check()
                for delta in answering.take(token):
                    yield Delta(index, *delta)
                if answering.ended:
                    break
        answer = stream.answer
        if answer.finish_reason == "interrupted" and not answering.ended:  # while it was refreshed
            raise Cancelled
        for delta in answering.end():
            yield Delta(index, *delta)
        reason = "tool_calls" if answering.reply.called else "stop" if answering.ended else answer.finish_reason
        yield Ended(
            index=index,
            reason=reason,
            prompt_tokens=len(ask.prompt_ids),
            tokens=answering.tokens,
            thinking=answering.thinking,
            first_s=first_s,
            report=answer.report,
            logprobs=answering.left(),
        )

    def _load_grammars(self) -> None:
        """Read the vocabulary for grammars, once. On a CPU its memory counts in every plan from now on."""
        if self._grammars.ready:
            return
        device = self._engine.device
        before = held_memory(device)
        self._grammars.load()
        trim_heap()
        grown = max(0, held_memory(device) - before)
        self._engine.opened = replace(self._engine.opened, runtime=self._engine.opened.runtime + grown)


@dataclass
class _Answering:
    """An answer on its way from tokens to pieces. `ended`: as many calls as were asked for came."""

    ask: Ask
    request: Request
    tokens: int = 0
    thinking: int = 0
    ended: bool = False
    logprobs: Logprobs | None = None
    _waiting: list[Logprob] = field(default_factory=list)
    _has_call: bool = False  # the one that was asked for

    def __post_init__(self) -> None:
        request = self.request
        self.reply = Reply(request.calls, request.tools, request.closes)
        if request.forced:
            self.reply.begin_call()

    def take(self, token: Token) -> Iterator[tuple[Piece, tuple[Logprob, ...]]]:
        """The pieces that a token makes whole, with the logprobs of the tokens since the last one."""
        if token.id is not None:
            self.tokens += 1
            self.thinking += self.reply.thinking
            if self.logprobs:
                self._waiting.append(self.logprobs.of(token.id))
        yield from self._told(self.reply.feed(token.text))

    def end(self) -> Iterator[tuple[Piece, tuple[Logprob, ...]]]:
        """What waited for more text."""
        if not self._has_call:
            yield from self._told(self.reply.end())

    def left(self) -> tuple[Logprob, ...]:
        """Logprobs of tokens that no piece has told."""
        left, self._waiting = tuple(self._waiting), []
        return left

    def _told(self, pieces: list[Piece]) -> Iterator[tuple[Piece, tuple[Logprob, ...]]]:
        for piece in pieces:
            if piece.call and self.request.one_call:
                if self._has_call:
                    continue
                self.ended = self._has_call = True
            yield piece, self.left()


@contextmanager
def _checked(layers: Any, check: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call `check` before each layer of the prompt pass, so that even a long one can be cancelled. Yields what ends
    that: the prompt has passed."""

    def before(module: nn.Module, inputs: Any) -> None:
        check()

    handles = [layer.register_forward_pre_hook(before) for layer in layers]

    def prompt_passed() -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    try:
        yield prompt_passed
    finally:
        prompt_passed()
