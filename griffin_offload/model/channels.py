"""What an answer's special tokens say of its text: where thinking begins and ends, and what is the reply.

Most special tokens say nothing to a reader, and a decoder leaves them out. Without those that part thinking from the
reply, the two would run together. gpt-oss writes messages in channels
(https://cookbook.openai.com/articles/openai-harmony):
`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Special tokens that stay in the text: around thinking, and around calls of tools.
KEPT = """<think> </think> [THINK] [/THINK] <seed:think> </seed:think> ◁think▷ ◁/think▷ <|channel> <channel|>
<|START_THINKING|> <|END_THINKING|> <|begin_of_thought|> <|end_of_thought|> <|begin_of_solution|> <|end_of_solution|>
<tool_call> </tool_call> [TOOL_CALLS] <|tool_call> <tool_call|> <|tool_call_start|> <|tool_call_end|> <|python_tag|>
<|START_ACTION|> <|END_ACTION|>""".split()  # noqa: SIM905
OPEN, CLOSE = "<think>\n", "\n</think>\n\n"  # in place of gpt-oss's channel of thinking
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
ENDS = ("<|start|>", "<|end|>", "<|return|>", "<|call|>")


@dataclass(frozen=True)
class Markers:
    """Token ids: `kept` special ones with their text, and those of messages in channels, by text; {} where a tokenizer
    has none."""

    kept: Mapping[int, str]
    channels: Mapping[int, str]


@lru_cache(maxsize=1)
def markers(tokenizer: Any) -> Markers:
    """The markers that a tokenizer has as special tokens. Others are text already."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {special[text]: text for text in KEPT if text in special}
    if CHANNEL not in special or MESSAGE not in special:
        return Markers(kept, {})
    return Markers(kept, {special[text]: text for text in (CHANNEL, MESSAGE, *ENDS) if text in special})


@dataclass(frozen=True)
class Reading:
    """What a token is: `before` it comes this text; it is `shown`, or says something else; it is of the `reply`, or of
    thinking."""

    before: str = ""
    shown: bool = True
    reply: bool = True


class Channels:
    """Reads the tokens of one answer in order."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._markers = tokenizer, markers(tokenizer)
        self._header: list[int] | None = None  # of a message that has not begun; None: within its text
        self._thinks = False

    def read(self, token: int) -> Reading:
        if token in self._markers.kept:
            return Reading(self._markers.kept[token], shown=False)
        mark = self._markers.channels.get(token)
        if mark is None:
            if self._header is None:
                return Reading(reply=not self._thinks)
            self._header.append(token)
            return Reading(shown=False)
        if mark == MESSAGE:
            channel = self._tokenizer.decode(self._header or []).split()
            self._header = None
            self._thinks = bool(channel) and not channel[0].startswith("final")
            return Reading(OPEN if self._thinks else "", shown=False, reply=False)
        closes, self._thinks = self._thinks, False
        self._header = []
        return Reading(CLOSE if closes else "", shown=False, reply=False)
