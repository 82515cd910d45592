"""The command line: streams, exit codes, bad input, the REPL. In process where possible; a process starts where a
signal, a pipe, a terminal or an import is the point."""

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

import click
import pytest
from click.testing import CliRunner, Result
from griffin_offload.cli.main import COMMANDS, griffin
from tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from griffin_offload.units import MIB, parse_bytes
from griffin_offload.version import __version__

PYTHON = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()"]
ANSWER = ("--max-new-tokens", "8", "--greedy")
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """run(*arguments, stdin=None) -> click's Result, with stdout and stderr apart."""

    def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(griffin, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback is never the answer
        return result

    return invoke


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "llama", "llama", chat=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli-base") / "llama", "llama")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights, but many layers and a long context: time enough for Ctrl-C, in the sweep and in the answer."""
    folder = tmp_path_factory.mktemp("cli-slow") / "llama"
    return tiny_checkpoint(folder, "llama", chat=True, num_hidden_layers=48, max_position_embeddings=20_000)


def failed(result: Result, code: int, *words: str) -> None:
    """Exactly one line on stderr, nothing on stdout, the exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


# griffin


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


def test_help_answers_in_under_0_3_seconds() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([*PYTHON, "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3  # the best of five: the machine may be busy


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
    for word in ("## griffin chat", "### griffin eval perplexity", "`/set [NAME VALUE]`", "| `--sparsity SHARE` |"):
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
        (["generate", "stray"], ["stray"]),
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


# griffin generate


def test_the_answer_alone_is_on_stdout_and_the_report_on_stderr(run: Run, model: Path) -> None:
    facts = json.loads(run("generate", "--model", model, "--prompt", "Hello", *ANSWER, "--json").stdout)
    result = run("generate", "--model", model, "--prompt", "Hello", *ANSWER)
    assert result.exit_code == 0
    assert result.stdout == facts["text"] + "\n"
    assert facts["text"]
    for label in ("resident", "peak memory", "budget", "decoding"):
        assert re.search(rf"^{label} ", result.stderr, re.MULTILINE)
    assert "\x1b" not in result.stderr, "no bar and no colour where there is no terminal"


KEYS = {
    "timings": {"plan_s", "prompt_s", "decode_s", "time_to_first_token_s", "decode_tokens_per_s"},
    "memory": {"full_bytes", "resident_bytes", "planned_peak_bytes", "measured_peak_bytes", "budget_bytes"},
    "io": {"checkpoint_bytes", "bytes_read"},
    "experts": {"kept_per_layer", "layers"},
    "precision": {"experts", "others", "head", "rest"},
}
PLAIN = {"text", "prompt_token_ids", "token_ids", "finish_reason"}
PLAIN |= {"model", "model_path", "sparsity", "dtype", "device", "ffn_skip"}


def test_json_is_one_object_with_the_promised_keys(run: Run, model: Path) -> None:
    result = run("generate", "--model", model, "--prompt", "Hello", "--sparsity", "0.5", *ANSWER, "--json")
    assert result.stdout.count("\n") == 1
    facts = json.loads(result.stdout)
    assert set(facts) == PLAIN | set(KEYS)
    for name, keys in KEYS.items():
        assert set(facts[name]) >= keys
    assert (facts["model"], facts["model_path"]) == (str(model), str(model))
    assert (facts["sparsity"], facts["dtype"], facts["device"]) == (0.5, "float32", "cpu")
    assert facts["finish_reason"] == "length"
    assert len(facts["token_ids"]) == 8
    assert facts["experts"] == {"kept_per_layer": [48, 48, 48], "layers": 3}
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert facts["prompt_token_ids"] == chat["input_ids"]


def ids(result: Result) -> list[int]:
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["prompt_token_ids"])


def test_a_prompt_is_the_same_from_its_three_sources(run: Run, model: Path, tmp_path: Path) -> None:
    common = ("generate", "--model", model, "--max-new-tokens", "1", "--json")
    text = "Grüße,\nwhat is 1+1?"
    (tmp_path / "p.txt").write_text(text + "\n")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    expected = ids(run(*common, "--prompt", text))
    assert ids(run(*common, stdin=text + "\n")) == expected, "a newline at the end belongs to the file"
    assert ids(run(*common, "--prompt-file", tmp_path / "p.txt")) == expected
    assert ids(run(*common, "--prompt-file", tmp_path / "windows.txt")) == expected
    assert ids(run(*common, "--prompt-file", "-", stdin=text)) == expected
    assert ids(run(*common, "--prompt", text + "\n")) != expected, "an argument is taken as it is"


def test_raw_and_system(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--max-new-tokens", "1", "--json", "--prompt", "Hello")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert ids(run(*common, "--raw")) == tokenizer("Hello")["input_ids"]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids(run(*common, "--system", "Be brief.")) == expected


def test_sampling_options(run: Run, model: Path) -> None:
    def tokens(*options: str) -> list[int]:
        result = run("generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "8", "--json", *options)
        return list(json.loads(result.stdout)["token_ids"])

    greedy = tokens("--greedy")
    assert tokens() == greedy, "this model's own generation config does not sample"
    assert tokens("--seed", "1", "--temperature", "5") == tokens("--seed", "1", "--temperature", "5")
    assert tokens("--seed", "1", "--temperature", "5") != tokens("--seed", "2", "--temperature", "5")
    assert tokens("--temperature", "5", "--seed", "1") != greedy
    assert tokens("--top-k", "1") == greedy
    assert tokens("--top-p", "0.0001", "--temperature", "0.01") == greedy


def test_nothing_is_pruned_unless_asked_where_the_model_fits(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--prompt", "Hello", *ANSWER, "--json")
    whole, pruned = run(*common), run(*common, "--sparsity", "0.5")
    assert json.loads(whole.stdout)["sparsity"] == 0
    assert "the whole model fits the device: no offloading needed" in whole.stderr
    assert "whole model fits" not in pruned.stderr
    assert "whole model fits" not in run(*common, "--sparsity", "0").stderr, "asked for, so there is nothing to say"


def test_text_streams_to_stdout_as_it_is_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout:
        """Remembers what was there at each flush."""

        encoding = "utf-8"

        def __init__(self) -> None:
            self.text, self.flushed = "", [""]

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            if self.text != self.flushed[-1]:
                self.flushed.append(self.text)

        def isatty(self) -> bool:
            return False

    stdout = Stdout()
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as caught:
        griffin.main(["generate", "--model", str(model), "--prompt", "Hello", "--max-new-tokens", "24", "--greedy"])
    assert caught.value.code == 0
    assert len(stdout.flushed) > 8
    assert stdout.flushed[-1].endswith("\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1.5"], ["sparsity", "1.5"]),
        (["--sparsity", "-0.5"], ["sparsity", "-0.5"]),
        (["--sparsity", "nan"], ["sparsity", "nan"]),
        (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--temperature", "0"], ["temperature", "greedy"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--seed", "-1"], ["seed"]),
        (["--device-memory", "much"], ["'much'", "4GiB"]),
        (["--device-memory", "10MB"], ["10 MiB", "budget"]),
        (["--device", "toaster"], ["'toaster'", "cpu"]),
    ],
)  # fmt: skip
def test_an_option_outside_its_range_is_one_line_and_code_1(
    run: Run, model: Path, options: list[str], words: list[str]
) -> None:
    words = [word.replace("10 MiB", "9.54 MiB") for word in words]
    failed(run("generate", "--model", model, "--prompt", "Hello", *options), 1, *words)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough layers to skip some."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli-deep") / "llama", "llama", chat=True, num_hidden_layers=8)


def test_skipped_blocks_are_reported(run: Run, deep: Path) -> None:
    options = ("--model", deep, "--prompt", "Hello", *ANSWER, "--ffn-skip", "1", "--ffn-skip-cold", "2,3")
    facts = json.loads(run("generate", *options, "--ffn-skip-warmup", "0", "--json").stdout)
    assert facts["ffn_skip"]["by_layer"] == [0, 0, 1, 1, 1, 0, 0, 0]
    block = facts["experts"]["kept_per_layer"][2] * 3 * 32 * 4
    assert facts["memory"]["resident_bytes"] - facts["memory"]["bytes_per_token"] == 3 * block
    said = run("generate", *options, "--ffn-skip-warmup", "0").stderr
    assert re.search(r"^skipped blocks +37.5% of 100.0% asked; by layer, in %: 0 0 100 100 100 0 0 0$", said, re.M)
    said = run("generate", *options, "--ffn-skip-mode", "prompt").stderr
    assert re.search(r"^skipped blocks +37.5% of 100.0% asked; layers: 2 3 4$", said, re.MULTILINE)


def test_an_export_says_which_blocks_are_zeros(run: Run, deep: Path, tmp_path: Path) -> None:
    skip = ("--ffn-skip", "1", "--ffn-skip-mode", "prompt", "--ffn-skip-cold", "2,3")
    result = run("export-pruned", "--model", deep, "--prompt", "Hello", "--out", tmp_path / "out", *skip)
    assert "3 blocks are left out, of layers 2, 3, 4: they are zeros in the file" in result.stderr
    result = run("export-pruned", "--model", deep, "--prompt", "Hello", "--out", tmp_path / "b", *skip, "--json")
    assert json.loads(result.stdout)["skipped"] == [2, 3, 4]


def test_the_defaults_in_the_help_are_those_of_the_rule(run: Run) -> None:
    from griffin_offload.options import FfnSkip

    defaults, screen = FfnSkip(0.5), " ".join(run("generate", "--help").stdout.split())
    first, last = defaults.cold
    for name, default in (
        ("cold FIRST,LAST", f"{first},{last}"),
        ("warmup N", defaults.warmup),
        ("run N", defaults.run),
    ):
        assert re.search(rf"--ffn-skip-{name} [^\[]*\[default: {default}[\],]", screen), name
    assert re.search(rf"--ffn-skip-mode [^\[]*\[token\|prompt\][^\[]*\[default: {defaults.mode}\]", screen)


def test_bad_prompts(run: Run, model: Path, tmp_path: Path) -> None:
    common = ("generate", "--model", model)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    failed(run(*common, "--prompt", ""), 1, "prompt is empty")
    failed(run(*common, stdin=""), 1, "prompt is empty")
    failed(run(*common, "--prompt-file", tmp_path / "empty.txt"), 1, "prompt is empty")
    failed(run(*common, "--prompt-file", tmp_path / "none.txt"), 1, "none.txt", "no such file")
    failed(run(*common, "--prompt-file", tmp_path), 1, str(tmp_path), "is a directory")
    failed(run(*common, "--prompt-file", "nul\0"), 1, "null")
    failed(run(*common, "--prompt-file", tmp_path / "latin.txt"), 1, "latin.txt", "not UTF-8", "byte 2")
    failed(run(*common, stdin=b"\xff\xfe"), 1, "stdin", "not UTF-8")
    failed(run(*common, "--prompt", "\udcff"), 1, "not UTF-8")
    failed(run(*common, "--prompt", "x" * 300), 1, "256")


def test_a_one_token_prompt_works(run: Run, base: Path) -> None:
    result = run("generate", "--model", base, "--prompt", "a", "--raw", "--sparsity", "0.5", *ANSWER)
    assert result.exit_code == 0
    assert result.stdout.strip()


@pytest.mark.parametrize("command", ["generate", "chat", "export-pruned", "mem-report"])
def test_no_such_model(run: Run, tmp_path: Path, command: str) -> None:
    more: dict[str, list[object]] = {
        "generate": ["--prompt", "a"],
        "export-pruned": ["--prompt-file", "-", "--out", tmp_path / "out"],
    }
    result = run(command, "--model", tmp_path / "nothing", *more.get(command, []), stdin="a")
    failed(result, 1, "nothing")


def test_a_broken_model_is_one_line(run: Run, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 3000 if file.suffix == ".safetensors" else None])
    failed(run("generate", "--model", copy, "--prompt", "a"), 1, "model.safetensors")


# griffin export-pruned


def test_export_prints_the_folder_and_how_to_load_it(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("export-pruned", "--model", model, "--prompt", "Hello", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')" in result.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 48
    failed(
        run("export-pruned", "--model", model, "--prompt-file", "-", "--out", tmp_path / "out", stdin="a"), 1, "--force"
    )
    again = run(
        "export-pruned", "--model", model, "--prompt", "a", "--sparsity", "0.75", "--out", tmp_path / "out", "--force"
    )
    assert again.exit_code == 0, again.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


def test_export_json(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("export-pruned", "--model", model, "--prompt", "Hello", "--out", tmp_path / "out", "--json")
    facts = json.loads(result.stdout)
    assert facts["path"] == str(tmp_path / "out")
    assert facts["sparsity"] == 0.5
    assert set(facts["files"]) == {file.name for file in (tmp_path / "out").iterdir()}
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_export_takes_the_prompt_from_a_file_of_that_name(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("What is the sky?\n")

    def prompt_hash(*prompt: str) -> str:
        result = run("export-pruned", "--model", model, *prompt, "--out", "out", "--force")
        assert result.exit_code == 0, result.stderr
        assert ("the text in the file p.txt" in result.stderr) == (prompt == ("--prompt", "p.txt"))
        assert ("the text given with --prompt" in result.stderr) == (prompt == ("--prompt", "What is the sky?"))
        return str(json.loads(Path("out/griffin.json").read_text())["prompt_sha256"])

    named = prompt_hash("--prompt", "p.txt")
    assert named == prompt_hash("--prompt-file", "p.txt") == prompt_hash("--prompt", "What is the sky?")
    Path("p.txt").write_text("")
    result = run("export-pruned", "--model", model, "--prompt", "p.txt", "--out", "none")
    assert result.exit_code == 1
    assert "prompt is empty" in result.stderr
    assert not Path("none").exists()


def test_a_sparsity_for_each_layer(run: Run, model: Path, tmp_path: Path) -> None:
    """Given with commas or in a file; a wrong number of them, or no number, is told."""
    (tmp_path / "shares.json").write_text("[0.25, 0.5, 1]\n")
    common = ("generate", "--model", model, "--prompt", "a", "--max-new-tokens", "2", "--json", "--sparsity")
    for shares in ("0.25,0.5,1", tmp_path / "shares.json"):
        answer = json.loads(run(*common, shares).stdout)
        assert answer["experts"]["kept_per_layer"] == [72, 48, 0]
        assert answer["sparsity"] == pytest.approx(1 - 120 / 288, abs=1e-3)
    failed(run(*common, "0.5,0.5"), 1, "2 sparsities", "3 layers")
    failed(run(*common, "half"), 2, "'half'", "is not a number")


def test_export_where_it_cannot(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    common = ("export-pruned", "--model", model, "--prompt-file", "-", "--out")
    failed(run(*common, tmp_path / "file", stdin="a"), 1, "is a file")
    failed(run(*common, tmp_path / "file" / "below", stdin="a"), 1, "file")
    assert (tmp_path / "file").read_text() == "mine"
    failed(run(*common, tmp_path / "out", "--sparsity", "2", stdin="a"), 1, "sparsity")
    assert not (tmp_path / "out").exists()


def test_export_as_gguf(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a b.gguf"
    common = ("export-pruned", "--model", model, "--prompt-file", "-", "--format", "gguf", "--out")
    result = run(*common, file, stdin="Hello")
    assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.stderr
    assert "in one file, of a model of " in result.stderr
    assert f"llama-cli -m '{file}'" in result.stderr
    failed(run(*common, file, stdin="Hello"), 1, "exists", "--force")
    options = ("--force", "--gguf-type", "q8_0", "--multiple-of", "96", "--json")
    facts = json.loads(run(*common, file, *options, stdin="Hello").stdout)
    assert facts["files"] == [file.name]
    assert facts["bytes"] == file.stat().st_size
    prompt = ("--prompt", "Hello", "--sparsity", "0", "--greedy", "--max-new-tokens", "8", "--json")
    answer = json.loads(run("generate", "--model", file, *prompt).stdout)
    assert answer["experts"]["kept_per_layer"] == [96] * 3


def test_export_options_that_do_not_go_together(run: Run, model: Path, tmp_path: Path) -> None:
    common = ("export-pruned", "--model", model, "--prompt-file", "-", "--out", tmp_path / "out.gguf")
    failed(run(*common), 2, "--format gguf")
    failed(run(*common[:-1], tmp_path / "out", "--gguf-type", "q8_0"), 2, "--format gguf")
    failed(run(*common[:-1], tmp_path / "out", "--format", "gguf", stdin="a"), 1, "does not end in .gguf")
    for option in ("--resident-dtype", "--rest"):
        failed(run(*common, "--format", "gguf", option, "int4"), 2, "--gguf-type q8_0", "llama-quantize")
    assert list(tmp_path.iterdir()) == []


# griffin mem-report


def test_mem_report_of_a_model(run: Run, model: Path) -> None:
    options = ("--sparsity", "0.5", "--prompt-tokens", "20", "--max-new-tokens", "10")
    facts = json.loads(run("mem-report", "--model", model, *options, "--json").stdout)
    assert (facts["prompt_tokens"], facts["max_new_tokens"], facts["sparsity"]) == (20, 10, 0.5)
    assert [layer["kept"] for layer in facts["layers"]] == [48, 48, 48]
    screen = run("mem-report", "--model", model, *options).stdout
    for row in facts["rows"]:
        assert row["name"] in screen
    assert len(re.findall(r"^ +[012] +48 +96 ", screen, re.MULTILINE)) == 3, "layer by layer"
    assert "to spare" in screen


def test_mem_report_of_a_model_that_does_not_fit_says_what_would(run: Run, model: Path) -> None:
    common = ("mem-report", "--model", model, "--prompt-tokens", "20")
    result = run(*common, "--device-memory", "10MB")
    failed(result, 1, "the budget is 9.54 MiB")
    smallest = re.search(r"--device-memory (\w+)", result.stderr)
    assert smallest
    enough = parse_bytes(smallest[1]) + 32 * MIB  # this process has grown a little since it was measured
    assert run(*common, "--device-memory", enough).exit_code == 0


def test_mem_report_of_the_last_run(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path))
    failed(run("mem-report", "--last"), 1, "no run")
    facts = json.loads(
        run("generate", "--model", model, "--prompt", "Hi", "--sparsity", "0.5", *ANSWER, "--json").stdout
    )
    last = json.loads(run("mem-report", "--last", "--json").stdout)
    assert {key: last[key] for key in KEYS} == {key: facts[key] for key in KEYS}
    assert "text" not in last, "what was asked and answered is nobody's business"
    screen = run("mem-report", "--last").stdout
    assert f"{model} at 50% sparsity, float32 on cpu" in screen
    assert "predicted" in screen
    assert "of the prediction" in screen
    (tmp_path / "last.json").write_text("{}")
    failed(run("mem-report", "--last"), 1, "another version")


def test_mem_report_of_this_machine(run: Run) -> None:
    facts = json.loads(run("mem-report", "--device-memory", "24GiB", "--json").stdout)
    assert facts["machine"]["budget"] == 24 * 2**30
    assert facts["machine"]["ram_total"] > facts["machine"]["ram_available"] > 0
    assert facts["machine"]["disk_read_bandwidth"] > 0
    models = {row["alias"]: row for row in facts["models"]}
    big = models["llama-2-13b"]
    assert big["full_bytes"] > 24 * 2**30 > big["resident_50"] > big["resident_75"]
    assert big["best"].startswith("bfloat16, 50% in int8")
    assert big["resident_50"] < big["best_bytes"] < 24 * 2**30
    assert models["smollm2-135m"]["best"] == "bfloat16"
    screen = run("mem-report", "--device-memory", "24GiB").stdout
    assert "24.00 GiB" in screen
    for name in ("RAM", "GPU", "disk", "llama-2-13b", "smollm2-135m"):
        assert name in screen


# griffin chat, through pipes


def chat(run: Run, model: Path, *lines: str, options: tuple[str, ...] = ()) -> Result:
    result = run("chat", "--model", model, *ANSWER, *options, stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    return result


def test_chat_answers_each_line_of_a_pipe(run: Run, model: Path, tmp_path: Path) -> None:
    result = chat(run, model, "one", "", "two", f"/save {tmp_path / 'talk.json'}")
    turns = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["one", "two"]
    assert result.stdout == "".join(turn["content"] + "\n" for turn in turns[1::2]), "the answers and nothing else"
    footers = re.findall(r"^8 tokens · [\d.]+ tokens/s · .* resident · first token after", result.stderr, re.MULTILINE)
    assert len(footers) == 2


def test_chat_goes_on_with_a_saved_conversation(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "my talk.json"
    first = chat(run, model, "one", f"/save {file}", "two").stdout
    assert chat(run, model, f"/load {file}", "two").stdout == first[len(chat(run, model, "one").stdout) :]
    file.write_text("not ours")
    result = chat(run, model, f"/load {file}", f"/save {file}", "/save", "one")
    assert result.stderr.count("error: ") == 3
    assert file.read_text() == "not ours"
    assert result.stdout == chat(run, model, "one").stdout


def test_chat_undo_clear_and_regen(run: Run, model: Path) -> None:
    once = chat(run, model, "one").stdout
    assert chat(run, model, "one", "/undo", "one").stdout == once * 2
    assert chat(run, model, "one", "two", "/clear", "one").stdout.endswith("\n" + once)
    assert chat(run, model, "one", "/regen").stdout == once * 2
    empty = chat(run, model, "/undo", "/regen", "/clear")
    assert empty.stdout == ""
    assert "nothing to take back" in empty.stderr
    assert "error: there is no answer yet" in empty.stderr
    assert "forgot the conversation; the system text stays" in empty.stderr


def test_chat_system(run: Run, model: Path) -> None:
    plain = chat(run, model, "one").stdout
    told = chat(run, model, "one", options=("--system", "Be brief.")).stdout
    assert told != plain
    assert chat(run, model, "/system Be brief.", "one").stdout == told
    assert chat(run, model, "/system none", "one", options=("--system", "Be brief.")).stdout == plain
    assert "system: Be brief." in chat(run, model, "/system", options=("--system", "Be brief.")).stderr


def test_chat_set(run: Run, model: Path) -> None:
    plain = chat(run, model, "one").stdout
    result = chat(run, model, "/set max_new_tokens 3", "one")
    assert len(result.stdout) < len(plain)
    assert "3 tokens · " in result.stderr
    assert "cut at max_new_tokens" in result.stderr
    assert chat(run, model, "/set sparsity 0.9", "one").stdout != plain
    assert "resident" in chat(run, model, "one", "/mem").stderr
    result = chat(
        run, model, "/set", "/set sparsity 2", "/set heat 1", "/set top_k", "/set temperature 1", "/mem", "one"
    )
    assert re.search(r"^max_new_tokens: 8$", result.stderr, re.MULTILINE)
    assert result.stderr.count("error: ") == 4
    assert "nothing is resident" in result.stderr
    assert result.stdout == plain, "a refused setting changes nothing"


def test_chat_help_exit_and_unknown_commands(run: Run, model: Path) -> None:
    result = chat(run, model, "/help", "/dance", "/exit", "one")
    assert result.stdout == ""
    names = "/help /clear /undo /regen /system /set /mem /save /load /exit"
    assert f"error: no command /dance: there are {names}\n" in result.stderr
    for name in names.split():
        assert re.search(rf"^{name}\b", result.stderr, re.MULTILINE)


def test_chat_takes_several_lines_as_one_turn(run: Run, model: Path, tmp_path: Path) -> None:
    def heard(*lines: str) -> list[str]:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        chat(run, model, *lines, f"/save {file}")
        return [turn["content"] for turn in json.loads(file.read_text())["messages"][::2]]

    assert heard("a\\", "b\\", "c", "d") == ["a\nb\nc", "d"]
    assert heard('"""', "a", "", "b", '"""', "d") == ["a\n\nb", "d"]
    assert heard('"""a', 'b"""') == ["a\nb"]
    assert heard('"""/undo"""') == ["/undo"], "in a block a slash is text"
    assert chat(run, model, '"""', "a").stdout == chat(run, model, "a").stdout, "the end of the input ends a block"


def test_a_turn_that_fails_is_shown_and_the_conversation_goes_on(run: Run, model: Path) -> None:
    result = chat(run, model, "x" * 400, "one")
    assert re.search(r"^error: .*256", result.stderr, re.MULTILINE)
    assert result.stdout == chat(run, model, "one").stdout


def test_a_base_model_chats_through_a_transcript(run: Run, base: Path) -> None:
    result = chat(run, base, "one", options=("--system", "S."))
    assert "has no chat template" in result.stderr
    assert result.stdout.endswith("\n")


# Signals, pipes and terminals


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
