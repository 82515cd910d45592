"""A signal that ends the process lets it clean up first."""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

WORDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}
PATIENCE = 2.0  # seconds that cleaning up has before the next signal ends that too


class Stopped(SystemExit):
    """The process is asked to end: raised in the main thread by SIGTERM and SIGHUP. The exit code is 128 + the signal.

    No KeyboardInterrupt, which ends an answer and no more."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number, self.words = number, WORDS[signal.Signals(number).name]


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM and SIGHUP in this block raise Stopped; its one line goes to stderr. A signal that is ignored, as by
    nohup, or has a handler stays so."""
    numbers = [number for name in WORDS if (number := getattr(signal, name, None)) is not None]
    raised = -PATIENCE

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if time.monotonic() - raised >= PATIENCE:
            raised = time.monotonic()
            raise Stopped(number)

    def lost(unraisable: "sys.UnraisableHookArgs") -> None:
        """The signal came while an object was deleted, where Python drops exceptions: it comes again."""
        nonlocal raised
        error = unraisable.exc_value
        if not isinstance(error, Stopped | KeyboardInterrupt):
            hook(unraisable)
            return
        raised = -PATIENCE
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        main = threading.main_thread().ident or 0
        again = partial(signal.pthread_kill, main) if hasattr(signal, "pthread_kill") else _thread.interrupt_main
        threading.Timer(0.01, again, (number,)).start()

    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    except Stopped as stopped:
        with suppress(OSError, ValueError):  # the terminal may be gone
            sys.stderr.flush()
            os.write(sys.stderr.fileno(), f"{stopped.words}\n".encode())
        raise
    finally:
        sys.unraisablehook = hook
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
