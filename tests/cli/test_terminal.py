"""Signals, pipes and terminals: a process of its own, on a terminal or a pipe that breaks."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import ANSWER, PYTHON


class Terminal:
    """A griffin process on a pseudo-terminal, with stdout and stderr on it too."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
            os.execv(sys.executable, [*PYTHON, *(str(argument) for argument in arguments)])
        self.screen = ""

    def wait_for(self, text: str) -> None:
        """Read on until the screen shows `text`; what came after it stays."""
        assert self.comes(text, 120), f"{text!r} never came: {self.screen!r}"

    def comes(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self.screen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            piece = self._read() if ready else ""
            if not piece:
                return False
            self.screen += piece
        self.screen = self.screen.partition(text)[2]
        return True

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def more(self) -> str:
        """Read on for at least 20 characters more, and return what the screen shows."""
        while len(self.screen) < 20 and (piece := self._read()):
            self.screen += piece
        return self.screen

    def exit_code(self) -> int:
        """Wait for the end; what was printed until then is in `screen`."""
        while piece := self._read():
            self.screen += piece
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> str:
        """What is there, or comes next; "" at the end."""
        try:
            return os.read(self.fd, 65536).decode(errors="replace")
        except OSError:  # Linux, when the other side is closed
            return ""


CTRL_C, CTRL_D = "\x03", "\x04"


SHOW_CURSOR, ERASE_LINE = "\x1b[?25h", "\x1b[2K"


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for one in started:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.fd)


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    terminal: Callable[..., Terminal], slow: Path, tmp_path: Path
) -> None:
    talk = terminal("chat", "--model", slow, "--max-new-tokens", "9000", "--greedy", "--sparsity", "0.5")
    talk.wait_for("> ")
    for _ in range(20):  # Python misses a signal that comes before it waits for the first key
        talk.type(CTRL_C)
        if talk.comes("Ctrl-D or /exit leaves", 2):
            break
    talk.wait_for("> ")
    talk.type("Hello\n")
    talk.wait_for("48/48")
    talk.wait_for(SHOW_CURSOR)
    talk.wait_for(ERASE_LINE)  # the bar is gone
    assert re.search("[a-zA-Z0-9]", talk.more()), "some of the answer"
    talk.type(CTRL_C)
    talk.wait_for("stopped")
    talk.wait_for("> ")
    talk.type(f"/save {tmp_path / 'talk.json'}\n")
    talk.wait_for("saved 2 messages")
    question, answer = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert question["content"] == "Hello"
    assert answer["content"], "the part that was made is kept"
    talk.wait_for("> ")
    talk.type(CTRL_D)
    assert talk.exit_code() == 0


def test_ctrl_c_in_the_sweep_is_one_line_and_code_130(
    terminal: Callable[..., Terminal], slow: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("The sky is blue. " * 900)
    ask = terminal("generate", "--model", slow, "--prompt-file", tmp_path / "long.txt", "--sparsity", "0.5")
    ask.wait_for("Reading the model")
    ask.wait_for("/48")
    ask.type(CTRL_C)
    assert ask.exit_code() == 130
    assert "interrupted" in ask.screen
    assert "Traceback" not in ask.screen


def test_ctrl_c_in_the_answer_of_generate_keeps_what_there_is(slow: Path) -> None:
    arguments = ["generate", "--model", str(slow), "--prompt", "Hello", "--max-new-tokens", "9000", "--sparsity", "0.5"]
    with subprocess.Popen([*PYTHON, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        first = process.stdout.read(1)
        assert first, "nothing came"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout.endswith(b"\n")
    lines = stderr.decode().splitlines()
    assert lines[0].startswith("full model")
    assert lines[-1] == "interrupted"


def test_a_reader_that_leaves_early_is_no_error(model: Path) -> None:
    arguments = ["generate", "--model", str(model), "--prompt", "Hello", "--max-new-tokens", "200", "--sparsity", "0.5"]
    with subprocess.Popen([*PYTHON, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_ctrl_c_ends_a_chat_that_waits_for_its_pipe(model: Path) -> None:
    arguments = ["chat", "--model", str(model), *ANSWER]
    pipe = subprocess.PIPE
    with subprocess.Popen([*PYTHON, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write("Hello\n")
        process.stdin.flush()
        while "tokens/s" not in (line := process.stderr.readline()):
            assert line, "ended early"
        for _ in range(4):  # until one comes when it waits, not when it still puts the last answer away
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
                break
        assert process.returncode == 130
        assert process.stderr.read().endswith("interrupted\n")
