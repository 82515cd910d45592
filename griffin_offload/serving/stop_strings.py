"""Text up to the first of several stop strings, as it comes."""

from collections.abc import Sequence


def partial_tail(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark that is not there yet."""
    longest = min(max(map(len, marks), default=1) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of the marks begins, the longest where several do, and which it is; -1 where there is none."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (-1, "")


class StopStrings:
    """Passes text on up to the first stop string. What may be the beginning of one waits for the next piece."""

    def __init__(self, marks: Sequence[str]) -> None:
        self.done = False
        self._marks, self._held = marks, ""

    def feed(self, text: str) -> str:
        if self.done:
            return ""
        self._held += text
        at, _ = first_of(self._held, self._marks)
        self.done = at >= 0
        if self.done:
            return self._held[:at]
        end = len(self._held) - partial_tail(self._held, self._marks)
        ready, self._held = self._held[:end], self._held[end:]
        return ready

    def end(self) -> str:
        """No more text follows: what waited."""
        return "" if self.done else self._held
