"""How far a long run of rows is: a bar on a terminal, a line now and then elsewhere."""

import time
from contextlib import ExitStack, suppress

from ..jsonl import Results
from . import _console as console
from ._signals import Stopped


class Pace:
    """Tells on stderr how far a long run is: call `step` after rows. A signal that ends the block tells it too.

    `total`: rows in all, some of which may be in `results` already. Without a bar, at most one line in `every` seconds.
    `on_layer(done, total)` shows beside the bar which layer passes."""

    def __init__(self, results: Results, total: int, what: str, every: float = 10.0) -> None:
        self._results, self._total, self._what, self._every = results, total, what, every
        self._first = len(results.rows)
        self._start = self._told = time.monotonic()
        self._open = ExitStack()
        self._bar: console.Bar | None = None
        if self._first:
            console.note(f"continuing after {self._first} of {total} {what}")

    def __enter__(self) -> "Pace":
        self._bar = self._open.enter_context(console.rows_progress(self._what, self._total, self._first))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._open.close()
        if kind and issubclass(kind, KeyboardInterrupt | Stopped):
            done = f"{len(self._results.rows)} of {self._total} {self._what}"
            with suppress(OSError):  # the terminal may be gone
                console.note(f"{done} are in {self._results.path}; the same command continues")

    def step(self) -> None:
        now, done = time.monotonic(), len(self._results.rows)
        if done == self._first:
            return
        left = duration((now - self._start) / (done - self._first) * (self._total - done))
        if self._bar:
            rate = (done - self._first) / max(now - self._start, 1e-9)
            self._bar(completed=done, pace=f"{rate:.3g} {self._what}/s, about {left} left")
        elif now - self._told >= self._every and done < self._total:
            self._told = now
            console.note(f"{done} of {self._total} {self._what}, about {left} left")

    def on_layer(self, done: int, total: int) -> None:
        if self._bar:
            self._bar(layer=f"layer {done} of {total}" if done < total else "")


def duration(seconds: float) -> str:
    """Two places that matter: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
