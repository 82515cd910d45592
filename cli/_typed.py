"""What people type in a chat -> messages: a line, lines that go on, a block between two lines of three quotes."""

import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import GriffinError
from ..inputs import PROMPT
from ..units import format_bytes
from ._print import echo, is_terminal

BLOCK = '"""'
SIGN, MORE = "> ", "… "


def is_block(text: str) -> bool:
    return text.lstrip().startswith(BLOCK)


def goes_on(text: str) -> bool:
    r"""Whether another line belongs to what was typed so far: a block is open, or the last line ends with \."""
    if is_block(text):
        block = text.lstrip().removeprefix(BLOCK)
        return not block.rstrip().endswith(BLOCK)
    return text.endswith("\\")


def message_of(text: str) -> str:
    """The message of what was typed. That of a block begins with a blank: a slash in it makes no command."""
    if is_block(text):
        return " " + text.lstrip().removeprefix(BLOCK).rstrip().removesuffix(BLOCK).strip()
    lines = text.split("\n")
    return "\n".join([*(line.removesuffix("\\") for line in lines[:-1]), lines[-1].removesuffix("\\")]).strip()


def require_end(size: int) -> None:
    """Raises GriffinError for a message without an end."""
    if size > PROMPT:
        raise GriffinError(f"a message is larger than {format_bytes(PROMPT)}, the most that is read here")


class Lines:
    """Messages from a pipe, or from a terminal that can no more than show a line (dumb, or its output is elsewhere)."""

    def __init__(self) -> None:
        self.terminal = is_terminal(sys.stdin)
        if self.terminal:
            with suppress(ImportError):  # Windows: the terminal has its own
                import readline  # noqa: F401  importing it gives input() its line editing and history

    def close(self) -> None:
        """Nothing has to be undone."""

    def ask(self, status: Callable[[], str]) -> str:
        """The next message; "" for an empty line. There is no place for the `status`. Raises EOFError at
        the end, GriffinError for a message without one."""
        text = self._line(SIGN)
        while goes_on(text):
            try:
                text += "\n" + self._line(MORE)
            except EOFError:
                break
            require_end(len(text))
        return message_of(text)

    def _line(self, sign: str) -> str:
        if self.terminal:
            if not is_terminal(sys.stdout):  # the sign is for people; the answers go to a file
                echo(sign, err=True, end="")
                sign = ""
            return input(sign).encode("utf-8", "replace").decode("utf-8")
        line = sys.stdin.buffer.readline(PROMPT + 1) if sys.stdin else b""
        require_end(len(line))
        if not line:
            raise EOFError
        return line.decode("utf-8", errors="replace").rstrip("\r\n")


@contextmanager
def typing(*, shown: bool) -> Iterator[None]:
    """While the block runs, the terminal shows what is typed, or keeps it unseen for who reads next. Ctrl-C stays."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    changed, flags = list(before), termios.ECHO | termios.ICANON
    changed[3] = before[3] | flags if shown else before[3] & ~flags
    termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
