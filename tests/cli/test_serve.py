"""`griffin serve` as a process: its address, its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from command_line import PYTHON, Run, failed

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

Start = Callable[..., tuple[subprocess.Popen[str], int]]
BODY = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"2": -100}, "temperature": 1}


@pytest.fixture
def start() -> Iterator[Start]:
    """start(model, *options) -> the process, and its port."""
    running: list[subprocess.Popen[str]] = []

    def begin(model: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
        command = [*PYTHON, "serve", "--model", str(model), "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        assert process.stderr
        line = process.stderr.readline()
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1; Ctrl-C stops", line)
        assert found, line
        return process, int(found[1])

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@contextmanager
def ask(port: int, **body: object) -> Iterator[HTTPResponse]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        content = json.dumps({**BODY, **body})
        connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response


def ends(process: subprocess.Popen[str]) -> str:
    """Exit code 0, nothing on stdout; what stderr has."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    return err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_well(start: Start, model: Path, number: int) -> None:
    process, port = start(model)
    with ask(port, max_tokens=3) as response:
        assert json.loads(response.read())["usage"]["completion_tokens"] == 3
    process.send_signal(number)
    assert "3 tokens" in ends(process)


def test_a_signal_lets_the_running_answer_end_and_a_second_one_does_not(start: Start, slow: Path) -> None:
    process, port = start(slow)
    with ask(port, stream=True, max_tokens=15_000) as response:
        assert response.read(10)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert b"the server is stopping" in response.read()
    assert "Traceback" not in ends(process)


def test_what_cannot_be_served_is_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed(run("serve", "--model", model, "--port", port), 1, f"port {port}", "another --port")
    failed(run("serve", "--model", model, "--host", "0.0.0.0"), 1, "--api-key", "GRIFFIN_API_KEY")
    failed(run("serve", "--model", model, "--host", "no.such.host.invalid", "--api-key", "x"), 1, "cannot serve on")
    failed(run("serve", "--model", model, "--port", 70_000), 2, "port")
    failed(run("serve", "--model", model, "--greedy", "--temperature", 1), 2, "--greedy")
    failed(run("serve", "--model", model, "--max-body", "huge"), 1, "huge")
    failed(run("serve", "--model", "no-such-model", "--port", 0), 1, "no-such-model")
    import griffin_offload.serving

    monkeypatch.setattr("griffin_offload.serving", griffin_offload.serving)  # the package comes back with its modules
    for name in [name for name in sys.modules if name.startswith("griffin_offload.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    failed(run("serve", "--model", model, "--port", 0), 1, "griffin-offload[serve]")


def test_more_than_the_memory_is_an_error_of_the_request(start: Start, model: Path) -> None:
    """The server stays; each request is planned."""
    process, port = start(model, "--device-memory", "1MiB")
    with ask(port) as response:
        assert response.status == 400
        assert json.loads(response.read())["error"]["code"] == "memory_budget_exceeded"
    process.terminate()
    ends(process)
