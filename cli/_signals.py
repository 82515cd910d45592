"""A signal that ends the process lets it clean up first."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

WORDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}


class Stopped(SystemExit):
    """The process is asked to end: raised in the main thread by SIGTERM and SIGHUP. The exit code is 128 + the signal.

    No KeyboardInterrupt, which ends an answer and no more."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.words = WORDS[signal.Signals(number).name]


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM and SIGHUP in this block raise Stopped, once; its one line goes to stderr. A signal that is ignored, as
    by nohup, or has a handler stays so."""
    numbers = [number for name in WORDS if (number := getattr(signal, name, None)) is not None]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # nothing interrupts the cleaning up
        raise Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        with suppress(OSError, ValueError):  # the terminal may be gone
            sys.stderr.flush()
            os.write(sys.stderr.fileno(), f"{stopped.words}\n".encode())
        raise
