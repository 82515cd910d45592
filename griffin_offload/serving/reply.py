"""An answer's text, as it comes -> the reply, thinking, and calls of tools."""

from collections.abc import Collection
from typing import NamedTuple

from ..marks import first_of, partial_tail
from .tools import Call, CallForm

# How models mark thinking. Those with channels of messages are written as <think> by model/channels.py.
THINKING = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<|channel>thought\n": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}


def thinks_already(prompt: str) -> str:
    """The end of the thinking that a prompt has begun, as some templates do; '' if it has not."""
    for opens, closes in THINKING.items():
        if prompt.rstrip().endswith(opens.rstrip()):
            return closes
    return ""


class Piece(NamedTuple):
    """A part of an answer: a text of the reply or of thinking, or a whole call."""

    text: str = ""
    thinking: bool = False
    call: Call | None = None


class Reply:
    """Reads one answer. Thinking is read where an answer begins, and behind other thinking and calls."""

    def __init__(self, calls: CallForm | None = None, tools: Collection[str] = (), closes: str = "") -> None:
        """`calls`: how tools are called, of the names `tools`; `closes`: the mark that ends thinking which the prompt
        has begun."""
        self.called = False
        self._calls, self._tools = calls, tools
        self._buffer, self._opened = "", ""  # _opened: the mark that began the call that is being read
        self._bare = False  # no mark began it: only what is nothing else is a call
        self._closes, self._in_call = closes, False
        self._fresh, self._trim = True, bool(closes)  # nothing of the reply yet; white space follows that is no text

    @property
    def thinking(self) -> bool:
        return bool(self._closes)

    def begin_call(self) -> None:
        """The answer was made to be a call: it begins within it."""
        self._in_call, self._fresh = True, False

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def end(self) -> list[Piece]:
        """No more text follows: what waited. A call may lack its end."""
        pieces: list[Piece] = []
        if self._in_call:
            self._take_call(self._buffer, "", pieces)
        elif not self.called or self._buffer.strip():
            self._say(self._buffer, pieces)
        self._buffer = ""
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Take what is whole from the buffer; whether there may be more."""
        if self._in_call:
            closes = self._calls.closes if self._calls and not self._bare else ""
            at = self._buffer.find(closes) if closes else -1
            if at < 0:
                return False
            text, self._buffer = self._buffer[:at], self._buffer[at + len(closes) :]
            self._take_call(text, closes, pieces)
            return True
        if self._closes:
            return self._think(pieces)
        return self._read(pieces)

    def _think(self, pieces: list[Piece]) -> bool:
        at = self._buffer.find(self._closes)
        if at >= 0:
            self._say(self._buffer[:at].rstrip(), pieces)
            self._buffer = self._buffer[at + len(self._closes) :]
            self._closes, self._fresh, self._trim = "", True, True
            return True
        self._pass([self._closes], pieces, spaces=False)
        return False

    def _read(self, pieces: list[Piece]) -> bool:
        """The reply itself, up to the next mark."""
        marks = list(THINKING) if self._fresh else []
        if self._calls:
            marks.append(self._calls.opens)
            begins = self._buffer.lstrip() if self._fresh else ""
            if begins.startswith(("{", "[{")):
                self._in_call = self._bare = True
            if self._bare or begins == "[":
                return False
        at, mark = first_of(self._buffer, marks)
        if at >= 0 and mark in THINKING and self._buffer[:at].strip():  # only where a reply begins
            self._fresh = False
            return True
        if at < 0:
            self._pass(marks, pieces, spaces=not self._fresh and not self._calls)
            return False
        before, self._buffer = self._buffer[:at].rstrip(), self._buffer[at + len(mark) :]
        self._say(before, pieces)
        if mark in THINKING:
            self._closes, self._trim = THINKING[mark], True
        else:
            self._in_call, self._opened = True, mark
        return True

    def _pass(self, marks: list[str], pieces: list[Piece], *, spaces: bool) -> None:
        """Pass on the buffer, without what may be the beginning of a mark. `spaces`: also those at its end, which are
        no text where a mark follows."""
        end = len(self._buffer) - partial_tail(self._buffer, marks)
        if not spaces:
            end = len(self._buffer[:end].rstrip())
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        self._say(text, pieces)

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            self._fresh = self._fresh and self.thinking
            pieces.append(Piece(text, self.thinking))

    def _take_call(self, text: str, closes: str, pieces: list[Piece]) -> None:
        """The calls in a text; as it is, if there are none."""
        self._in_call = False
        found = self._calls.parse(text, self._tools if self._bare else ()) if self._calls else []
        if found:
            self.called, self._fresh, self._trim = True, True, True
            pieces.extend(Piece(call=call) for call in found)
        else:
            self._say(f"{self._opened}{text}{closes}", pieces)
        self._opened = ""
