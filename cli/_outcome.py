"""Every outcome of a command -> what is printed, and an exit code. cli/main.py tells the codes."""

import os
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn

import click

from ..errors import GriffinError
from ..files import reason
from ..foreign import ERROR, NAME, printable, sentence
from ._print import echo, is_terminal

UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h
CLICKS = (SystemExit, click.ClickException, click.Abort, click.exceptions.Exit)


@contextmanager
def told() -> Iterator[None]:
    """An exception of this block ends the process with one line, and a code; click's own go on."""
    try:
        yield
    except CLICKS:
        raise
    except KeyboardInterrupt:
        if debugging():
            raise
        fail_interrupted()
    except BrokenPipeError:
        raise  # a closed pipe is the reader's choice: click leaves quietly
    except BaseException as error:
        if debugging():
            raise
        fail(describe(error), 1 if is_users(error) else UNFORESEEN)


def is_users(error: BaseException) -> bool:
    """Whether an error is for the user to fix, as far as is known."""
    return isinstance(error, GriffinError | OSError) or is_out_of_memory(error) or is_installation(error)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def is_installation(error: BaseException) -> bool:
    """Whether a package is not there, or damaged, and not a file of Griffin's own."""
    return isinstance(error, ImportError) and not (error.name or "").startswith("griffin_offload")


def describe(error: BaseException) -> str:
    """What went wrong, as one line. Python's own errors may have no text: then their name."""
    if is_out_of_memory(error):
        return "out of memory: set --device-memory lower, or close what else is running"
    if isinstance(error, GriffinError | OSError):
        name = error.filename if isinstance(error, OSError) and error.strerror else None
        named = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
        text = reason(error) if isinstance(error, OSError) else sentence(error)
        return named + (text or type(error).__name__)
    if is_installation(error):
        return f"a package is missing or damaged ({sentence(error, NAME)}): install griffin-offload again"
    return unforeseen(error)


def unforeseen(error: BaseException) -> str:
    """An error that nobody foresaw, in a line."""
    name, text = type(error).__name__, sentence(error, 300)
    return (
        f"this is a fault of Griffin's ({name}{f': {text}' if text else ''}), not yours: GRIFFIN_DEBUG=1 shows its "
        "traceback; please report it to the authors of griffin-offload with that"
    )


def debugging() -> bool:
    return os.environ.get("GRIFFIN_DEBUG", "0") not in ("", "0")


def fail(message: str, code: int) -> NoReturn:
    text = f"error: {sentence(message, ERROR)}"
    if is_terminal(sys.stderr):  # whole words, as far as they are no longer than the screen
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    leave(text, code)


def fail_interrupted() -> NoReturn:
    leave("interrupted", 130)


def leave(text: str, code: int) -> NoReturn:
    """The last line, and the end. What stdout could not take is dropped: Python would try it again, and complain."""
    with suppress(OSError, ValueError):
        echo(text, err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
    sys.exit(code)


def hook_threads() -> None:
    """Exceptions that no handler sees are told as safely: in a thread with a line, elsewhere with their traceback."""

    def in_thread(facts: threading.ExceptHookArgs) -> None:
        if facts.exc_value is None or isinstance(facts.exc_value, SystemExit):
            return
        if debugging():
            at_the_end(facts.exc_type, facts.exc_value, facts.exc_traceback)
        else:
            echo(f"error: {describe(facts.exc_value)}", err=True)

    def at_the_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        echo(printable("".join(traceback.format_exception(kind, error, trace))), err=True, end="")

    threading.excepthook, sys.excepthook = in_thread, at_the_end
