"""A few stored rows of a weight, and what holds it: what every format's functions take."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Settings = Mapping[str, Any]  # what the config and the headers tell: bits, rows, columns, block sizes ...


class Rows(NamedTuple):
    """Rows [first, last) of the tensor that has a weight's numbers; of them columns [left, right)."""

    first: int
    last: int
    left: int
    right: int


def need(holds: bool, why: str) -> None:
    """Raises ValueError where tensors of a weight do not fit each other."""
    if not holds:
        raise ValueError(why)


def block_size(size: int, count: int, asked: int) -> int:
    """Numbers of a block where `count` blocks make `size`: as many as the config says (`asked`), the last block perhaps
    cut, or the same for all. Raises ValueError where that is not possible."""
    if asked and -(-size // asked) == count:
        return asked
    need(count > 0 and size % count == 0, f"{count} scales for {size} numbers")
    return size // count
