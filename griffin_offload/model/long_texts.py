"""Token ids of texts that may be far longer than a model reads: a tokenizer takes hundreds of bytes a token."""

from collections.abc import Callable
from typing import Any

PIECE = 2**16  # characters
USUAL = 8  # more characters than a token has in most texts: a text of fewer is tokenized at once
BORDERS = 16  # tokens that a cut through a text may add


def has_more_tokens(tokenizer: Any, text: str, most: int) -> bool:
    """Whether a text has surely more than `most` tokens. Counts in pieces, up to there, and only in a long text."""
    if len(text) <= max(PIECE, USUAL * most):
        return False
    count = 0
    for begin in range(0, len(text), PIECE):
        ids = tokenizer(text[begin : begin + PIECE], add_special_tokens=False)["input_ids"]
        count += max(0, len(ids) - BORDERS)
        if count > most:
            return True
    return False


def first_tokens(encode: Callable[[str], list[int]], text: str, most: int) -> list[int]:
    """The token ids of a text, or of as long a beginning of it that it surely has the first `most`."""
    end = max(PIECE, USUAL * most)
    while len(ids := encode(text[:end])) < most + BORDERS and end < len(text):
        end *= 2
    return ids
