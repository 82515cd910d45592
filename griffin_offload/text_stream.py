"""From the tokens that transformers' generate hands out to answers: token ids, the times they came at, and text."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from greenlet import getcurrent, greenlet
from transformers.generation.streamers import BaseStreamer

from .errors import GriffinError
from .marks import first_of, partial_tail
from .model.channels import Channels

T = TypeVar("T")


class Token(NamedTuple):
    """A token of an answer and the text that is whole with it, which may be empty. `id` None: text that never became a
    whole character, at the end."""

    id: int | None
    text: str


OnToken = Callable[[Token], None]


class UntilStop:
    """Passes pieces of a text on up to the first of some stop strings.

    Text that may be the beginning of one is held back until a later piece decides."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.text = ""  # what was passed on
        self.done = False  # a stop string was there
        self._stops, self._held = stops, ""

    def __call__(self, piece: str) -> str:
        """What may be passed on now."""
        if self.done:
            return ""
        self._held += piece
        at, _ = first_of(self._held, self._stops)
        self.done = at >= 0
        return self._pass(at if self.done else len(self._held) - partial_tail(self._held, self._stops))

    def close(self) -> str:
        """No more text follows: what was held back is no stop string."""
        return "" if self.done else self._pass(len(self._held))

    def _pass(self, end: int) -> str:
        ready, self._held = self._held[:end], self._held[end:]
        self.text += ready
        return ready


class Streamer:
    """Collects an answer's tokens and their times, and passes them on with their text, up to one of the `stops`."""

    def __init__(
        self, tokenizer: Any, eos_token_ids: set[int], on_token: OnToken | None = None, stops: Sequence[str] = ()
    ) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._tokenizer, self._eos_token_ids, self._on_token = tokenizer, eos_token_ids, on_token
        self._channels = Channels(tokenizer)
        self._runs: list[_Run] = []
        self._passed_on = ""
        self._until = UntilStop(stops) if stops else None
        self._stops_at: int | None = None  # tokens

    def stop(self, tokens: int) -> None:
        """The answer ends with so many tokens, by a stop string or another criterion: what follows fills the row up."""
        if self._stops_at is None:
            self._stops_at = tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop string, or another criterion that is no length, ended the answer."""
        return self._stops_at is not None and len(self.token_ids) >= self._stops_at

    @property
    def searches(self) -> bool:
        """Whether a text may end the answer."""
        return self._until is not None

    @property
    def text(self) -> str:
        """The whole answer. Thinking in a channel of its own stands in <think> and </think>."""
        return self._until.text if self._until and self._until.done else self._whole

    @property
    def reply(self) -> str:
        """The answer without thinking that the model wrote in a channel of its own: what its next turn is told."""
        reply = "".join(self._decoded(run) for run in self._runs if run.reply)
        return reply[: max(0, len(reply) - len(self._whole) + len(self.text))]

    @property
    def _whole(self) -> str:
        """The text, and what came with its last token behind a stop string."""
        return "".join(self._decoded(run) for run in self._runs)

    def put(self, token: int) -> None:
        if self.stopped or (self.token_ids and self.token_ids[-1] in self._eos_token_ids):
            return  # the rest of the batch goes on; this row is filled up
        self.times.append(time.perf_counter())
        self.token_ids.append(token)
        reading = self._channels.read(token)
        text = ""
        if reading.before:
            text += self._held_back()
            text += reading.before
            self._runs.append(_Run(reading.reply, literal=reading.before))
        if reading.shown:
            if not self._runs or self._runs[-1].literal or self._runs[-1].reply != reading.reply:
                self._runs.append(_Run(reading.reply))
            self._runs[-1].ids.append(token)
            text += self._grown(self._runs[-1]) if self._on_token or self._until else ""
        self._passed_on += text
        if self._until:
            text = self._until(text)
            if self._until.done:
                self.stop(len(self.token_ids))
        if self._on_token:
            self._on_token(Token(token, text))

    def end(self) -> None:
        rest = self._held_back()
        self._passed_on += rest
        if self._until:
            rest = self._until(rest) + self._until.close()
        if self._on_token and rest:
            self._on_token(Token(None, rest))

    def _grown(self, run: "_Run") -> str:
        """What is whole of a run's text since the last call."""
        before = self._decode(run.ids[run.begin : run.read])
        now = self._decode(run.ids[run.begin :])
        if len(now) <= len(before) or now.endswith("\ufffd"):  # an unfinished character waits for its end
            return ""
        run.begin, run.read = run.read, len(run.ids)
        return now[len(before) :]

    def _held_back(self) -> str:
        """What the last run still has of an unfinished character."""
        if not (self._on_token or self._until) or not self._whole.startswith(self._passed_on):
            return ""
        return self._whole[len(self._passed_on) :]

    def _decoded(self, run: "_Run") -> str:
        return run.literal or self._decode(run.ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


@dataclass
class _Run:
    """Tokens that are decoded together, or a `literal` text. Tokens [begin, read) give the text last passed on: context
    for the next ones."""

    reply: bool
    ids: list[int] = field(default_factory=list)
    literal: str = ""
    begin: int = 0
    read: int = 0


class BatchStreamer(BaseStreamer):  # type: ignore[misc]
    """Hands every new token to the streamer of its row in the batch: at once, or (`waits`) when `tell` is called.

    `tokens`: the new ones, by row."""

    def __init__(self, streamers: list[Streamer]) -> None:
        self.tokens: list[int] = []
        self.waits = self._prompt_passed = False
        self._streamers = streamers
        self._untold: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tell()
        if self._prompt_passed:
            self.tokens = self._untold = value.flatten().tolist()
            if not self.waits:
                self.tell()
        self._prompt_passed = True

    def tell(self) -> None:
        """Hands the new tokens on, if that was not done yet."""
        tokens, self._untold = self._untold, []
        for streamer, token in zip(self._streamers if tokens else (), tokens, strict=True):
            streamer.put(token)

    def end(self) -> None:
        self.tell()
        for streamer in self._streamers:
            streamer.end()


class TokenStream(Generic[T]):
    """The tokens of an answer as they are made. Between two of them nothing is computed, except that a GPU goes on with
    the step of the next one. Closing it, or leaving its `with` block, cancels the rest. `answer` is there once it has
    ended or was closed after a token.

    The answer is made in a greenlet, a stack of its own on this thread: use a stream from one thread only."""

    def __init__(self, make: Callable[[OnToken], T]) -> None:
        """`make(on_token)` makes the answer; a KeyboardInterrupt out of `on_token` ends it early."""
        self._stack = greenlet(lambda: make(self._pass_on))
        self._answer: T | None = None
        self._ended = False
        self._grad = torch.is_grad_enabled()

    @property
    def answer(self) -> T:
        """Raises GriffinError before the end."""
        if self._answer is None:
            raise GriffinError("the answer is not finished: read its tokens to the end, or close the stream")
        return self._answer

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        if self._ended:
            raise StopIteration
        value = self._switch(self._stack.switch)
        if self._ended:
            self._answer = value
            raise StopIteration
        token: Token = value
        return token

    def close(self) -> None:
        """Cancel what is still to come. The answer as far as it came is in `answer`, if it has a token."""
        if self._stack and not self._ended:
            with suppress(KeyboardInterrupt):
                value = self._switch(lambda: self._stack.throw(KeyboardInterrupt))
                while not self._ended:  # text that waited for its character's end
                    value = self._switch(self._stack.switch)
                self._answer = value
        self._ended = True

    def __enter__(self) -> "TokenStream[T]":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # in another thread, or as Python ends
            self.close()

    def _switch(self, into: Callable[[], Any]) -> Any:
        """Go on with the answer until its next token. What it sets for its computing stays on its side."""
        self._stack.parent = getcurrent()
        ours = torch.is_grad_enabled()
        torch.set_grad_enabled(self._grad)
        try:
            return into()
        finally:
            self._ended = self._stack.dead
            self._grad = torch.is_grad_enabled()
            torch.set_grad_enabled(ours)

    def _pass_on(self, token: Token) -> None:
        parent = self._stack.parent
        assert parent
        parent.switch(token)
