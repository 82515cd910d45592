"""What may reach a terminal, without rich: `griffin --help` reads this file. Streams are looked up at each call."""

import sys
from typing import IO, Any

import click

from ..foreign import printable


def is_terminal(stream: IO[str] | None) -> bool:
    """False also for a stream that was closed before the program began."""
    return stream is not None and stream.isatty()


def echo(text: Any = "", *, err: bool = False, end: str = "\n") -> None:
    """A line to stdout, or to stderr. A pipe or a file gets a result as it is; a terminal, and stderr, which people
    read, get nothing that a terminal would obey."""
    stream = sys.stderr if err else sys.stdout
    text = str(text)
    click.echo((printable(text) if err or is_terminal(stream) else text) + end, nl=False, err=err)


def command(sequence: str) -> None:
    """An escape sequence of our own, to the terminal at stdout, at once."""
    sys.stdout.write(sequence)
    sys.stdout.flush()
