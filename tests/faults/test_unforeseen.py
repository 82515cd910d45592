"""What nobody foresaw is one line, an exit code of its own, and no end of what can go on."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from command_line import PYTHON
from griffin_offload.cli import _outcome, models
from griffin_offload.cli.main import COMMANDS, griffin

from griffin_offload.errors import GriffinError
from griffin_offload.serving.worker import Job, Worker

pytestmark = pytest.mark.fault


class Panic(BaseException):
    """As the Rust libraries' own, which is no Exception."""


class Mute(Exception):
    """Without a text, and with one that cannot be told."""

    def __str__(self) -> str:
        return ""


def endless(depth: int = 0) -> int:
    return endless(depth + 1)


def encode() -> None:
    "\ud800".encode()


UNFORESEEN: dict[str, Callable[[], Any]] = {
    "key": lambda: {}["gone"],
    "type": lambda: len(5),  # type: ignore[arg-type]
    "assertion": lambda: (_ for _ in ()).throw(AssertionError("left == right")),
    "recursion": endless,
    "unicode": encode,
    "end_of_file": lambda: (_ for _ in ()).throw(EOFError("no data")),
    "system": lambda: (_ for _ in ()).throw(SystemError("null argument")),
    "torch": lambda: torch.ones(2) @ torch.ones(3),
    "panic": lambda: (_ for _ in ()).throw(Panic("called `Option::unwrap()`")),
    "mute": lambda: (_ for _ in ()).throw(Mute),
    "long": lambda: (_ for _ in ()).throw(ValueError("x" * 100_000)),
    "several_lines_and_escapes": lambda: (_ for _ in ()).throw(ValueError("a\n\x1b[2Jb\u202e")),
}


def run_with(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], Any]) -> Result:
    monkeypatch.setattr(models, "entries", fault)
    return CliRunner().invoke(griffin, ["models"])


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_an_exception_is_one_line_and_code_70(
    kind: str, monkeypatch: pytest.MonkeyPatch, foreseen: list[BaseException]
) -> None:
    result = run_with(monkeypatch, UNFORESEEN[kind])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 70
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: this is a fault of Griffin's ({type(foreseen[0]).__name__}")
    assert "GRIFFIN_DEBUG=1" in result.stderr
    assert "report it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) < 1000
    foreseen.clear()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory"),
        (OSError(28, "No space left on device", "/a\x1b[2J"), 1, r"/a\x1b[2J: no space left on device"),
        (PermissionError(), 1, "PermissionError"),
        (GriffinError("a\nb"), 1, "error: a b"),
        (GriffinError(), 1, "GriffinError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.ClickException("not\nso"), 1, "error: not so"),
        (click.UsageError("no"), 2, "See 'griffin"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_was_foreseen_keeps_its_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, foreseen: list[BaseException]
) -> None:
    result = run_with(monkeypatch, lambda: (_ for _ in ()).throw(error))
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not foreseen


@pytest.mark.parametrize("name", ["tokenizers", "griffin_offload.nothing"], ids=["a_package", "a_file_of_ours"])
def test_a_package_that_is_missing_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, foreseen: list[BaseException]
) -> None:
    result = run_with(monkeypatch, lambda: (_ for _ in ()).throw(ImportError(f"no {name}", name=name)))
    assert name in result.stderr
    assert ("install" in result.stderr) == (name == "tokenizers") == (result.exit_code == 1)
    assert result.stderr.count("\n") == 1
    foreseen.clear()


def test_the_tests_see_what_the_handler_hides(pytestconfig: pytest.Config, foreseen: list[BaseException]) -> None:
    """The fixture that fails a test in which the handler told of a fault."""
    assert "KeyError" in _outcome.unforeseen(KeyError("x"))
    assert isinstance(foreseen.pop(), KeyError)


def test_debug_shows_the_traceback_of_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_DEBUG", "1")
    assert isinstance(run_with(monkeypatch, UNFORESEEN["key"]).exception, KeyError)


def test_an_exception_before_the_command_runs(monkeypatch: pytest.MonkeyPatch, foreseen: list[BaseException]) -> None:
    def damaged(*arguments: object) -> None:
        raise RuntimeError("half an installation")

    monkeypatch.setattr("griffin_offload.cli.main.apply", damaged)
    result = CliRunner().invoke(griffin, ["models"])
    assert (result.exit_code, result.stderr.count("\n")) == (70, 1)
    foreseen.clear()


class Full(io.StringIO):
    """A device without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_to_a_full_device(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as ended:
        griffin.main(arguments)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: no space left on device\n"


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        ("models --json > /dev/full", 1, "no space left on device"),
        ("models --json >&-", 0, ""),
        ("models --json | head -c 1 > /dev/null", 0, ""),
        ("nonsense 2>&-", 2, ""),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_stdout_that_takes_nothing(shell: str, code: int, words: str) -> None:
    program = f'"{sys.executable}" -c "from griffin_offload.cli.main import main; main()" {shell}'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip() == (f"error: {words}" if words else "")


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_no_file_gets_the_number_of_a_closed_stream(closed: list[int], tmp_path: Path) -> None:
    """Else what a library prints would be in the middle of an export."""
    program = (
        "import os, sys; from griffin_offload.cli.main import fill_closed; fill_closed(); "
        "sys.stdin.read(); print('out'); print('err', file=sys.stderr); os.write(1, b'C out'); os.write(2, b'C err'); "
        f"open({str(tmp_path / 'out')!r}, 'w').write(str(min(os.open('/dev/null', 0), 3)))"
    )
    shell = f'"$0" -c "$1" {" ".join(f"{number}>&-" for number in closed)}'
    done = subprocess.run(
        ["bash", "-c", shell, *PYTHON[:1], program], input="", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "3"
    assert ("out" in done.stdout, "err" in done.stderr) == (1 not in closed, 2 not in closed)


def test_an_exception_in_a_thread_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], foreseen: list[BaseException]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    _outcome.hook_threads()
    thread = threading.Thread(target=UNFORESEEN["several_lines_and_escapes"])
    thread.start()
    thread.join()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.strip().isprintable()
    foreseen.clear()


@pytest.mark.parametrize("kind", ["key", "panic", "recursion", "torch"])
def test_a_worker_that_meets_a_fault_answers_the_next_request(kind: str) -> None:
    def respond(request: Any, cancelled: Callable[[], bool]) -> Any:
        if request == "bad":
            UNFORESEEN[kind]()
        yield "event"

    def recover() -> None:
        raise OSError("and that failed too")

    worker = Worker(respond, 4, recover=recover)
    ended: list[Any] = []
    for request in ("bad", "good"):
        heard: list[Any] = []
        done = threading.Event()

        def on_event(event: Any, heard: list[Any] = heard, done: threading.Event = done) -> None:
            heard.append(event)
            if event is None or hasattr(event, "status"):
                done.set()

        worker.submit(Job(request, on_event))  # type: ignore[arg-type]
        assert done.wait(10), "the thread has died"
        ended.append(heard)
    assert ended[0][-1].status == 500
    assert json.dumps(ended[0][-1].to_json()).count("\\n") == 0
    assert ended[1] == ["event", None]
    worker.stop()
    assert worker.join(5)


def test_the_command_as_users_start_it(tmp_path: Path) -> None:
    """A fault in a process of its own, through `main`."""
    program = (
        "import sys; sys.argv = ['griffin', 'models']\n"
        "from griffin_offload.cli import main, models\n"
        "def fault(): raise KeyError('x')\n"
        "models.entries = fault\n"
        "main.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRIFFIN_DEBUG"}
    done = subprocess.run([*PYTHON[:2], program], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (70, "", 1), done.stderr
    shown = subprocess.run(
        [*PYTHON[:2], program], capture_output=True, text=True, check=False, env={**environment, "GRIFFIN_DEBUG": "1"}
    )
    assert "Traceback" in shown.stderr
    assert "KeyError: 'x'" in shown.stderr
