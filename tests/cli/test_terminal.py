"""Signals, pipes and terminals: a process of its own, on a terminal or a pipe that breaks."""

import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from command_line import ANSWER, PYTHON
from screen import CTRL_C, Screen


def test_ctrl_c_in_the_sweep_is_one_line_and_code_130(slow: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("The sky is blue. " * 900)
    ask = Screen("generate", "--model", slow, "--prompt-file", tmp_path / "long.txt", "--sparsity", "0.5")
    try:
        ask.wait_for("Reading the model")
        ask.wait_for("/48")
        ask.type(CTRL_C)
        assert ask.exit_code() == 130
        assert ask.lines[-1] == "interrupted"
        assert "Traceback" not in ask.text
    finally:
        ask.close()


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
