"""An answer on a terminal, drawn while it comes."""

import time

from ..foreign import printable
from . import _console as console


class AnswerScreen:
    """An answer on a terminal, rendered as Markdown while it comes: its finished blocks once, and the one that is open
    drawn again in its place, as much of its end as the screen has room for. Thinking is dim, or folded to one line."""

    EVERY = 0.08  # seconds between two drawings

    def __init__(self, *, folds: bool = False, markdown: bool = True) -> None:
        self._folds, self._markdown = folds, markdown
        self._open = ""  # what is not finished
        self._drawn: list[int] = []  # of the lines on the screen that are to be drawn again, their columns
        self._blanks = ""  # that thinking has ended with so far
        self._begun = self._thinks = False
        self._last = self._since = 0.0

    def reply(self, text: str) -> None:
        self._end_thinking()
        if not self._markdown:
            self._begun = True
            console.stream(text)
            return
        self._open += printable(text)
        if time.monotonic() - self._last >= self.EVERY:
            self._draw(console.finished(self._open))

    def thinking(self, text: str) -> None:
        if not self._thinks:
            self._finish()
            self._thinks, self._since, self._blanks = True, time.monotonic(), ""
        if self._folds:
            if time.monotonic() - self._last >= self.EVERY:
                self._write([], [f"thinking, {time.monotonic() - self._since:.0f} s"], dim=True)
        else:
            text = self._blanks + printable(text)
            self._blanks = text[len(text.rstrip()) :]
            if told := text.rstrip():
                self._begun = True
                console.write(f"\x1b[2m{told}\x1b[22m")

    def close(self) -> None:
        """The answer has ended: all of it is on the screen, and the cursor below it."""
        self._end_thinking()
        self._finish()
        if self._begun and not self._markdown:
            console.write("\n")

    def _end_thinking(self) -> None:
        if not self._thinks:
            return
        self._thinks = False
        if self._folds:
            self._write([f"thought for {time.monotonic() - self._since:.1f} s"], [], dim=True)
        else:
            console.write("\n")
        if not self._markdown:
            console.write("\n")

    def _finish(self) -> None:
        if self._open.strip():
            self._draw(len(self._open))
        self._open = ""

    def _draw(self, done: int) -> None:
        """Prints the first `done` characters for good, and the others so that they can be drawn again."""
        ready, self._open = self._open[:done], self._open[done:]
        width, height = console.console().size
        above = console.markdown_lines(ready, width - 1)
        below = console.markdown_lines(self._open, width - 1)[-max(1, height - 2) :]
        self._write(above, below)

    def _write(self, above: list[str], below: list[str], dim: bool = False) -> None:
        """Replaces the lines that are to be drawn again: by those `above`, for good, and those `below`."""
        width = max(1, console.console().width)
        rows = sum(max(1, -(-columns // width)) for columns in self._drawn)  # a screen that became narrower breaks them
        out = "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J" if self._drawn else ""
        gap = [""] if self._begun else []  # between two blocks
        self._begun = self._begun or bool(above)
        for_good = [*gap, *above] if above else []
        again = [*([""] if self._begun else []), *below] if below else []
        if dim:
            for_good, again = ([f"\x1b[2m{line}\x1b[22m" for line in lines] for lines in (for_good, again))
        out += "".join(f"{line}\n" for line in for_good) + "\n".join(again)
        self._drawn = [console.columns_of(line) for line in again]
        self._last = time.monotonic()
        console.write(out)
