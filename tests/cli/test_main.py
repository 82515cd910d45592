"""`griffin` itself: what it imports, its help, wrong usage."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from command_line import Run, failed
from griffin_offload.cli.main import COMMANDS, griffin

from griffin_offload.version import __version__


def imported(*arguments: str) -> set[str]:
    """Names of the heavy packages that a command line imports."""
    code = (
        "import sys\n"
        "from griffin_offload.cli.main import griffin\n"
        "try: griffin.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'rich', 'huggingface_hub', 'safetensors', 'gguf'}\n"
        "print('IMPORTED', *(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"]])
def test_griffin_itself_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(*arguments) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_does_not_import_torch(name: str) -> None:
    assert imported(name, "--help") <= {"rich"}


def test_the_help_lines_are_the_commands_own(run: Run) -> None:
    screen = run("--help").stdout
    for name, (_, line) in COMMANDS.items():
        command = griffin.get_command(click.Context(griffin), name)
        assert command is not None
        assert command.get_short_help_str(200) == line
        assert re.search(rf"^  {name} +{re.escape(line)}$", screen, re.MULTILINE), "it fits on one line"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(run: Run, name: str) -> None:
    command = griffin.get_command(click.Context(griffin), name)
    assert command is not None
    assert run(name, "--help").exit_code == 0
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_docs_commands_is_up_to_date() -> None:
    from griffin_offload.cli._docs import document

    written = (Path(__file__).parents[2] / "docs" / "commands.md").read_text("utf-8")
    assert written == document(), "run `make docs`"
    for word in ("## griffin chat", "### griffin eval perplexity", "`/set [NAME [VALUE]]`", "| `--sparsity SHARE` |"):
        assert word in written


def test_version_and_bare_griffin(run: Run) -> None:
    assert run("--version").stdout == f"griffin {__version__}\n"
    assert run().stdout == run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["No such command 'nonsense'", "See 'griffin --help'"]),
        (["--nonsense"], ["--nonsense"]),
        (["generate", "--nonsense"], ["--nonsense", "See 'griffin generate --help'"]),
        (["generate", "--prompt", "a", "--prompt-file", "b"], ["leave one out"]),
        (["generate", "--prompt", "a", "--greedy", "--temperature", "1", "--seed", "0"], ["--temperature, --seed"]),
        (["generate", "--prompt", "a", "--raw", "--system", "b"], ["--raw", "--system"]),
        (["generate", "--prompt", "a", "--dtype", "int8"], ["--dtype", "float32"]),
        (["generate", "--prompt", "a", "--sparsity", "half"], ["--sparsity", "half"]),
        (["generate", "--prompt", "a", "--max-new-tokens", "1.5"], ["--max-new-tokens"]),
        (["generate", "--prompt", "a", "--ffn-skip", "much"], ["--ffn-skip", "much"]),
        (["generate", "--prompt", "a", "--ffn-skip-mode", "layer"], ["--ffn-skip-mode", "token"]),
        (["generate", "--prompt", "a", "--ffn-skip-cold", "2"], ["FIRST,LAST", "2,2"]),
        (["generate", "--prompt", "a", "--ffn-skip-mode", "prompt"], ["--ffn-skip-mode", "needs --ffn-skip SHARE"]),
        (["generate", "--prompt", "a", "--ffn-skip-run", "1"], ["--ffn-skip-run", "needs --ffn-skip SHARE"]),
        (
            ["generate", "--prompt", "a", "--ffn-skip", "0.5", "--ffn-skip-mode", "prompt", "--ffn-skip-warmup", "1"],
            ["--ffn-skip-warmup", "--ffn-skip-mode token"],
        ),
        (["export-pruned", "--prompt", "a", "--out", "c", "--ffn-skip", "0.5"], ["--ffn-skip-mode prompt"]),
        (["chat", "--greedy", "--top-k", "5"], ["--top-k"]),
        (["export-pruned", "--prompt", "a"], ["--out"]),
        (["export-pruned", "--prompt", "a", "--prompt-file", "b", "--out", "c"], ["leave one out"]),
        (["mem-report", "--sparsity", "0.5"], ["--sparsity", "--model"]),
        (["mem-report", "--last", "--model", "a"], ["--last"]),
        (["mem-report", "--model", "a", "--prompt-tokens", "0"], ["--prompt-tokens"]),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(run: Run, arguments: list[str], words: list[str]) -> None:
    failed(run(*arguments), 2, *words)


def test_debug_shows_the_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_DEBUG", "1")
    result = CliRunner().invoke(griffin, ["generate", "--model", str(model), "--prompt", ""])
    assert type(result.exception).__name__ == "PromptError"
    monkeypatch.setenv("GRIFFIN_DEBUG", "0")
    assert CliRunner().invoke(griffin, ["generate", "--model", str(model), "--prompt", ""]).exit_code == 1
