"""Where marks begin in a text that comes in pieces."""

from collections.abc import Sequence


def partial_tail(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark that is not there yet."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of the marks begins, the longest where several do, and which it is; -1 where there is none."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (-1, "")
