"""Parts an answer's text into thinking and reply, as it comes."""

from collections.abc import Callable, Sequence

from ..marks import first_of, partial_tail

OnPart = Callable[[str], None]
MARKS = {  # how thinking begins -> how it ends
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}


def open_mark(prompt: str) -> str:
    """The mark that ends the thinking which a prompt's end has begun already; '' where it has begun none."""
    return next((end for begin, end in MARKS.items() if prompt.rstrip().endswith(begin)), "")


class Parting:
    """Passes text on to `on_thinking` or `on_reply`, without the marks and without the white space that follows one.

    `until`: the mark that ends thinking, where the answer begins within it. What may be the beginning of a mark is held
    back until the next piece decides."""

    def __init__(self, on_thinking: OnPart, on_reply: OnPart, until: str = "") -> None:
        self._on = {True: on_thinking, False: on_reply}
        self._until, self._held, self._blank = until, "", bool(until)

    def __call__(self, piece: str) -> None:
        self._held += piece
        while (found := first_of(self._held, self._marks))[0] >= 0:
            at, mark = found
            self._pass(at)
            self._held = self._held[len(mark) :]
            self._until, self._blank = MARKS.get(mark, ""), True
        self._pass(len(self._held) - partial_tail(self._held, self._marks))

    def close(self) -> None:
        """No more text follows."""
        self._pass(len(self._held))

    @property
    def _marks(self) -> Sequence[str]:
        return (self._until,) if self._until else tuple(MARKS)

    def _pass(self, end: int) -> None:
        ready, self._held = self._held[:end], self._held[end:]
        if self._blank:
            ready = ready.lstrip()
        if ready:
            self._blank = False
            self._on[bool(self._until)](ready)
