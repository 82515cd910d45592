"""A griffin process on a pseudo terminal, whose screen is read as a person reads it."""

import os
import time

import pexpect
import pyte
from command_line import PYTHON

CTRL_C, CTRL_D, CTRL_R, CTRL_U, TAB, UP, ALT_ENTER = "\x03", "\x04", "\x12", "\x15", "\t", "\x1b[A", "\x1b\r"
PATIENCE = 30  # seconds


def pasted(text: str) -> str:
    """What a terminal sends for a paste."""
    return f"\x1b[200~{text}\x1b[201~"


class Screen:
    """`type` sends keys; `wait_for` reads on until the screen shows a text, wherever its lines are broken."""

    def __init__(self, *arguments: object, columns: int = 100, rows: int = 40, **environment: str) -> None:
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        env |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment}
        command = [*PYTHON[1:], *map(str, arguments)]
        self.process = pexpect.spawn(PYTHON[0], command, dimensions=(rows, columns), env=env)
        self.process.delaybeforesend = None
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.01)
        self._stream, self.raw = pyte.ByteStream(self._screen), b""

    @property
    def lines(self) -> list[str]:
        """Everything that is on the screen, what was scrolled away first."""
        columns = range(self._screen.columns)
        above = ["".join(line[x].data for x in columns).rstrip() for line in self._screen.history.top]
        return "\n".join([*above, *(line.rstrip() for line in self._screen.display)]).rstrip().split("\n")

    @property
    def text(self) -> str:
        """The same in one line."""
        return " ".join(" ".join(self.lines).split())

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def say(self, line: str, answer: str) -> None:
        """Types a line, and waits for what comes of it and for the next prompt."""
        before = self.text.count(answer)
        self.type(line + "\r")
        self.wait_for(answer, before + 1)
        self.wait_for_prompt()

    def wait_for(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + PATIENCE
        while self.text.count(text) < times:
            assert time.monotonic() < end, f"{text!r} never came:\n" + "\n".join(self.lines)
            assert self._read(0.5) is not None, f"{text!r} never came before the end:\n" + "\n".join(self.lines)

    def wait_for_prompt(self) -> None:
        """Reads on until an empty prompt stands above the status line."""
        end = time.monotonic() + PATIENCE
        while not (len(self.lines) > 1 and self.lines[-2] == ">" and " tokens" in self.lines[-1]):
            assert time.monotonic() < end, "no prompt:\n" + "\n".join(self.lines)
            assert self._read(0.5) is not None, "no prompt before the end:\n" + "\n".join(self.lines)

    def settle(self, seconds: float = 0.3) -> None:
        """Reads on until nothing has come for a while."""
        while self._read(seconds):
            pass

    def read_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._read(0.05) is not None:
            pass

    def resize(self, columns: int, rows: int) -> None:
        self.process.setwinsize(rows, columns)
        self._screen.resize(rows, columns)

    def exit_code(self) -> int:
        """Waits for the end."""
        end = time.monotonic() + PATIENCE
        while self._read(0.5) is not None:
            assert time.monotonic() < end, "it does not end:\n" + "\n".join(self.lines)
        self.process.wait()
        return int(self.process.exitstatus)

    def close(self) -> None:
        self.process.close(force=True)

    def _read(self, seconds: float) -> bool | None:
        """Whether something came; None at the end."""
        try:
            piece = self.process.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return False
        except pexpect.EOF:
            return None
        self.raw += piece
        self._stream.feed(piece)
        return True
