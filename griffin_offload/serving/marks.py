"""Where marks begin in a text that comes in pieces."""

from collections.abc import Sequence


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of the marks begins, the longest where several do, and which it is; -1 where there is none."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (-1, "")
