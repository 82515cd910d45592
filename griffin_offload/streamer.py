"""The text of an answer whose tokens come from elsewhere, such as transformers' own `generate` on an exported model.

Special tokens are left out, but those that part thinking from the reply stay (model/channels.py)."""

from typing import Any

from . import text_stream
from .options import OnText
from .text_stream import OnToken, Token


class Streamer(text_stream.Streamer):
    """Takes an answer's tokens: `put` each, then `end`. `on_text` gets text as soon as its characters are whole; `text`
    is all of it, `reply` without the thinking."""

    def __init__(self, tokenizer: Any, eos_token_ids: set[int], on_text: OnText | None = None) -> None:
        super().__init__(tokenizer, eos_token_ids, texts_to(on_text) if on_text else None)


def texts_to(on_text: OnText) -> OnToken:
    """Passes on the text of those tokens that have one."""

    def on_token(token: Token) -> None:
        if token.text:
            on_text(token.text)

    return on_token
