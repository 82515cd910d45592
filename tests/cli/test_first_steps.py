"""What a new user types first: a prompt as an argument, a pipe beside it, --quiet, a job run again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import Result
from command_line import ANSWER, PYTHON, Run, failed


def ids(result: Result) -> list[int]:
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["prompt_token_ids"])


def test_a_prompt_may_be_an_argument(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--max-new-tokens", "1", "--json")
    expected = ids(run(*common, "--prompt", "why is it blue?"))
    assert ids(run(*common, "why is it blue?")) == expected
    assert ids(run(*common, "why", "is", "it", "blue?")) == expected
    failed(run(*common, "why?", "--prompt", "why?"), 2, "the prompt is given twice")
    failed(run(*common, "why?", "--input", "in.jsonl", "--output", "out.jsonl"), 2, "leave out the other prompt")
    failed(run(*common, "p.txt"), 1, "there is no file p.txt: --prompt-file FILE reads one")
    result = run(*common, __file__)
    assert result.exit_code == 0
    assert f"--prompt-file {__file__} would read a file" in result.stderr


def test_what_is_piped_in_goes_before_the_prompt(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--max-new-tokens", "1", "--json")
    expected = ids(run(*common, "--prompt", "The word is BANANA.\n\nRepeat the word."))
    assert ids(run(*common, "--prompt", "Repeat the word.", stdin="The word is BANANA.\n")) == expected
    assert ids(run(*common, "--prompt", "Repeat the word.", stdin=" \n")) == ids(
        run(*common, "--prompt", "Repeat the word.")
    )
    failed(run(*common, "--prompt", "x", stdin=b"\xff"), 1, "stdin is not UTF-8")


def test_a_pipe_that_stays_open_is_told_and_dev_null_is_no_pipe(model: Path) -> None:
    command = [*PYTHON, "generate", "--model", str(model), *ANSWER, "Hello"]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert b"waiting for the end of stdin" in process.stderr.readline()
        process.stdin.close()
        assert process.stdout.read().strip()


def test_quiet_leaves_the_answer_and_errors(run: Run, model: Path) -> None:
    told = run("generate", "--model", model, "Hello", *ANSWER)
    quiet = run("generate", "--model", model, "Hello", *ANSWER, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (told.stdout, "")
    failed(run("generate", "--model", model, "Hello", "-q", "--top-k", "-1"), 1, "top_k")
    assert "tokens/s" in run("generate", "--model", model, "Hello", *ANSWER).stderr, "and the next one is not"
    chat = run("chat", "--model", model, *ANSWER, "-q", stdin="Hello\n/dance\n")
    assert chat.stdout == told.stdout
    assert chat.stderr.startswith("error: no command /dance")
    assert chat.stderr.count("\n") == 1


def test_an_answer_that_is_cut_or_empty_says_so(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("generate", "--model", model, "Hello", *ANSWER)
    assert "the answer is cut after 8 tokens: --max-new-tokens N allows more" in result.stderr
    text = result.stdout.strip("\n")
    stopped = run("generate", "--model", model, "Hello", *ANSWER, "--stop", text[-1])
    assert stopped.stdout == text.partition(text[-1])[0] + "\n"
    assert "cut" not in stopped.stderr
    empty = run("generate", "--model", model, "Hello", *ANSWER, "--stop", text[:1])
    assert empty.stdout == "\n"
    assert "the answer is empty" in empty.stderr
    full = run("generate", "--model", model, "Hello " * 30, "--max-new-tokens", "900", "--greedy")
    assert "the context of 256 tokens is full" in full.stderr


def test_a_finished_job_run_again_ends_well(run: Run, model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    command = ("generate", "--model", model, "--input", source, "--output", output, *ANSWER)
    assert "2 prompts answered in" in run(*command).stderr
    before = output.read_bytes(), os.stat(output).st_mtime_ns
    again = run(*command)
    assert again.exit_code == 0
    assert "2 prompts are answered already in" in again.stderr
    assert "continuing" not in again.stderr
    assert (output.read_bytes(), os.stat(output).st_mtime_ns) == before
    failed(run(*command, "--sparsity", "0.5"), 1, "exists: choose another name, or --force")
    output.write_text(output.read_text() + '{"id": 3}\n')
    failed(run(*command), 1, "exists: choose another name, or --force")
    assert run(*command, "--force").exit_code == 0
    assert [row["id"] for row in map(json.loads, output.read_text().splitlines())] == [1, 2]
    source.write_text('{"prompt": "one"}\n')
    failed(run(*command), 1, "exists: choose another name, or --force")


def test_an_export_for_a_file_that_is_not_there_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    failed(run("export-pruned", "--model", model, "--prompt", "p.txt", "--out", tmp_path / "out"), 1, "no file p.txt")


@pytest.mark.parametrize("size", ["100TiB", "1000000GB"])
def test_more_memory_than_there_is_is_told(run: Run, model: Path, size: str) -> None:
    result = run("generate", "--model", model, "Hello", *ANSWER, "--device-memory", size)
    assert result.exit_code == 0
    assert "is more than the memory of this machine" in result.stderr
