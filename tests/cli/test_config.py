"""Settings from griffin.toml and GRIFFIN_... variables, `griffin config` and `griffin completion`."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import PYTHON, Run, failed

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write(text) -> the settings file that commands read from now on."""
    path = tmp_path / "griffin.toml"
    monkeypatch.setenv("GRIFFIN_CONFIG", str(path))

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


def answer(run: Run, *arguments: object) -> dict[str, Any]:
    result = run("generate", "--prompt", "Hello", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_the_nearest_setting_wins(run: Run, write: Write, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(*arguments: object) -> int:
        return len(answer(run, *arguments)["token_ids"])

    write(f'model = "{model}"\nmax_new_tokens = 3\ngreedy = true\n')
    assert tokens() == 3
    write(f'model = "{model}"\nmax-new-tokens = 3\n[generate]\nmax_new_tokens = 4\n[chat]\nmax_new_tokens = 9\n')
    assert tokens() == 4
    monkeypatch.setenv("GRIFFIN_MAX_NEW_TOKENS", "5")
    assert tokens() == 5
    monkeypatch.setenv("GRIFFIN_GENERATE_MAX_NEW_TOKENS", "6")
    assert tokens() == 6
    assert tokens("--max-new-tokens", 7) == 7


def test_values_are_those_of_the_command_line(run: Run, write: Write, model: Path) -> None:
    pruning = 'sparsity = [0.5, 0.25, 0.5]\nrest = "drop"\nfold = false\nprior = "off"\n'
    write(f'model = "{model}"\nno_fidelity = true\n{pruning}')
    told = answer(run, "--max-new-tokens", 2)
    assert told["rest"]["taken"] == "drop"
    assert told["fold"] is None
    assert told["fidelity"] is None
    assert answer(run, "--max-new-tokens", 2, "--sparsity", 0)["sparsity"] == 0


def test_greedy_and_sampling_yield_to_the_command_line(run: Run, write: Write, model: Path) -> None:
    write(f'model = "{model}"\ngreedy = true\nmax_new_tokens = 2\n')
    answer(run, "--temperature", 1)
    write(f'model = "{model}"\ntemperature = 0.5\nmax_new_tokens = 2\n')
    assert answer(run, "--greedy")["token_ids"] == answer(run, "--greedy")["token_ids"]
    write(f'model = "{model}"\ntemperature = 0.5\ngreedy = true\n')
    failed(run("generate", "--prompt", "x"), 1, "--greedy", "griffin.toml: greedy")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temprature = 1", ("griffin.toml: temprature is no option of any command; is it temperature?",)),
        ("[generate]\ntemprature = 1", ("[generate] temprature is no option of griffin generate",)),
        ("[generate]\nwindows = 1", ("[generate] windows is no option of griffin generate",)),
        ("[generat]\nmodel = 'x'", ("generat is no command of griffin; is it generate?",)),
        ("temperature = 'hot'", ("griffin.toml: temperature", "hot")),
        ("temperature = -1", ("griffin.toml: temperature", "outside its range")),
        ("temperature = true", ("griffin.toml: temperature cannot be True",)),
        ("rest = 'int3'", ("griffin.toml: rest", "int3")),
        ("greedy = 'maybe'", ("griffin.toml: greedy is on or off",)),
        ("sparsity = [1, [2]]", ("griffin.toml: sparsity cannot be",)),
        ("generate = 5", ("griffin.toml: generate is a command: write it as a section",)),
        ("prior_weight = 0.2\nprior = 'off'", ("--prior-weight needs", "griffin.toml: prior")),
        ("model = ", ("griffin.toml cannot be read",)),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(run: Run, write: Write, text: str, words: tuple[str, ...]) -> None:
    write(text)
    failed(run("generate", "--prompt", "x"), 1, *words)


def test_variables_that_are_wrong_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_TEMPERATURE", "hot")
    failed(run("generate", "--prompt", "x"), 1, "GRIFFIN_TEMPERATURE", "hot")
    monkeypatch.setenv("GRIFFIN_CONFIG", "/no/such/file.toml")
    failed(run("generate", "--prompt", "x"), 1, "GRIFFIN_CONFIG", "/no/such/file.toml")
    assert run("generate", "--help").exit_code == 0
    failed(run("config"), 1, "GRIFFIN_CONFIG")


def test_a_key_of_other_commands_is_no_error(run: Run, write: Write) -> None:
    write('windows = 3\nmodel = "x"\n[chat]\nsystem = "Be kind"\n[eval.perplexity]\nsparsity = [0.5]\n')
    assert run("models").exit_code == 0
    assert "available" in run("mem-report").output  # --model would plan a run instead


def test_config_shows_what_is_set_and_where(run: Run, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('model = "x"\n[eval.perplexity]\nsparsity = [0, 0.5]\n[serve]\nport = 9000\napi_key = "secret"\n')
    monkeypatch.setenv("GRIFFIN_CHAT_TOP_K", "7")
    monkeypatch.setenv("GRIFFIN_TOP_KK", "7")
    told = json.loads(run("config", "--json").stdout)
    assert (told["path"], told["exists"], told["unknown"]) == (str(path), True, ["GRIFFIN_TOP_KK"])
    rows = {(row["command"], row["option"]): (row["value"], row["source"]) for row in told["settings"]}
    assert rows["chat", "top_k"] == ("7", "GRIFFIN_CHAT_TOP_K")
    assert rows["serve", "port"] == ("9000", f"{path}: [serve] port")
    assert rows["serve", "api_key"][0] == "(set)"
    assert rows["eval perplexity", "sparsity"] == ("[0, 0.5]", f"{path}: [eval.perplexity] sparsity")
    shown = run("config")
    assert str(path) in shown.stderr
    assert "secret" not in shown.output
    assert "commands" in shown.stdout
    write("[serve]\nport = 70000\n")
    failed(run("config"), 1, "[serve] port")


def test_no_file_is_no_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRIFFIN_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = run("config")
    assert result.exit_code == 0
    assert "griffin.toml (not there yet)" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_ones_that_the_shell_takes(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_GRIFFIN_COMPLETE" in script
    if shutil.which(shell):
        check = ["--no-execute"] if shell == "fish" else ["-n"]
        subprocess.run([shell, *check], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("griffin comp", "completion"),
        ("griffin eval per", "perplexity"),
        ("griffin chat --temper", "--temperature"),
        ("griffin chat --model smol", "smollm2-135m"),
        ("griffin chat --rest d", "drop"),
    ],
)
def test_words_are_completed(words: str, expected: str) -> None:
    count = len(words.split()) - 1
    environment = {"_GRIFFIN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    command = [PYTHON[0], "-c", "import sys; sys.argv[0] = 'griffin'\n" + PYTHON[2]]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert f"plain,{expected}" in result.stdout.splitlines(), result
