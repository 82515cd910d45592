"""Files that are none: pipes that nobody writes to, devices without an end, a terabyte of nothing, folders, sockets.
Each is refused at once, in one line, by everything that reads a file; so is a text that is too long for its model."""

import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli import _typed
from griffin_offload.cli.main import griffin
from safetensors.torch import save_file
from tiny import tiny_checkpoint, tiny_tokenizer

from griffin_offload import Engine
from griffin_offload.chat import Conversation
from griffin_offload.checkpoint.one_file import read_facts
from griffin_offload.errors import BudgetError, CheckpointError, ContextError, GriffinError
from griffin_offload.inputs import read_input
from griffin_offload.jsonl import read_rows
from griffin_offload.model.long_texts import first_tokens, has_more_tokens
from griffin_offload.pruning.calibration_texts import CalibrationText, draw_samples, read_source
from griffin_offload.pruning.layer_allocation import load_curves
from griffin_offload.pruning.prior import load_prior

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

TERABYTE = 2**40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "m", "llama", chat=True)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, device_memory="600MiB")


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(TERABYTE)
    return path


def listening(path: Path) -> Path:
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


NO_FILES: dict[str, Callable[[Path], Path]] = {
    "a named pipe": fifo,
    "a terabyte": sparse,
    "a folder": folder,
    "a socket": listening,
    "/dev/zero": lambda path: Path("/dev/zero"),
    "a link to /dev/urandom": lambda path: path.symlink_to("/dev/urandom") or path,  # type: ignore[func-returns-value]
}


@pytest.fixture(params=NO_FILES)
def no_file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return NO_FILES[request.param](tmp_path / "none.txt")


def run(*arguments: object, text: str = "") -> Result:
    return CliRunner().invoke(griffin, list(map(str, arguments)), input=text)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_no_file_is_read(no_file: Path) -> None:
    with pytest.raises(OSError, match=r"pipe|larger than|directory|socket|device|address"):
        read_input(no_file)


READERS: dict[str, Callable[[Path], Any]] = {
    "rows": read_rows,
    "a text to calibrate with": read_source,
    "a conversation": Conversation.load,
    "curves": load_curves,
    "a prior": load_prior,
    "a session": read_facts,
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_it_says_so(reader: str, no_file: Path) -> None:
    with pytest.raises(GriffinError, match=r"none|/dev/zero"):
        READERS[reader](no_file)


COMMANDS: dict[str, list[str]] = {
    "generate --prompt-file": ["generate", "--prompt-file", "FILE"],
    "generate --input": ["generate", "--output", "out.jsonl", "--input", "FILE"],
    "export-pruned --calibration": ["export-pruned", "--out", "out", "--calibration", "FILE"],
    "calibrate --data": ["calibrate", "--data", "FILE"],
    "eval perplexity --data": ["eval", "perplexity", "--data", "FILE"],
    "eval choice --data": ["eval", "choice", "--data", "FILE"],
    "plot statistic --prompt-file": ["plot", "statistic", "--out", "out.png", "--prompt-file", "FILE"],
    "plot frontier": ["plot", "frontier", "--out", "out.png", "--results", "FILE"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["a named pipe", "/dev/zero", "a terabyte"])
def test_a_command_refuses_it(
    command: str, kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = NO_FILES[kind](tmp_path / "none.txt")
    arguments = [str(name) if word == "FILE" else word for word in COMMANDS[command]]
    refused(run(*arguments, *([] if "frontier" in arguments else ["--model", model])), name.name)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_page_is_not_written_to_a_pipe(model: Path, tmp_path: Path) -> None:
    name = fifo(tmp_path / "page.html")
    refused(run("generate", "--prompt", "hi", "--model", model, "--report", name), "no plain file")


def test_a_prior_of_layers_without_an_end(tmp_path: Path) -> None:
    facts = {"format": "griffin-prior", "facts": json.dumps({"layers": 10**9})}
    save_file({"0.0": torch.ones(4)}, tmp_path / "p", facts)
    with pytest.raises(GriffinError, match="layers"):
        load_prior(tmp_path / "p")


@pytest.mark.parametrize("kind", ["a named pipe", "/dev/zero", "a folder"])
def test_settings_that_are_no_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CONFIG", str(NO_FILES[kind](tmp_path / "griffin.toml")))
    refused(run("models"), "cannot be read")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["a named pipe", "a terabyte", "a link to /dev/urandom"])
def test_a_checkpoints_file_that_is_none(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "m"))
    (copy / name).unlink(missing_ok=True)
    NO_FILES[kind](copy / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is|config.json"):
        Engine(copy)


@pytest.mark.parametrize("text", ["none.txt", "no/where", "prompts.jsonl", "q.py", "./x"])
@pytest.mark.parametrize(
    "command", ["generate --prompt", "generate", "export-pruned --out o --prompt", "chat --system"]
)
def test_a_missing_file_is_no_prompt(command: str, text: str, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*command.split(), text, "--model", model), f"there is no file {text}")


@pytest.mark.parametrize("text", [" none.txt", "what is none.txt?", "e.g. this", "3.5", "Hello.", "..."])
def test_a_text_is_a_prompt(text: str, model: Path) -> None:
    assert run("generate", "--prompt", text, "--model", model, "--max-new-tokens", 1).exit_code == 0


def test_what_a_process_substitution_gives_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"hello")
    os.close(writing)
    assert read_input(f"/dev/fd/{reading}", pipe=True) == b"hello"
    os.close(reading)
    assert read_input(os.devnull) == b""


def test_a_pipe_without_an_end_stops_at_the_limit() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            while True:
                os.write(writing, b"y" * 2**16)
        except BaseException:
            os._exit(0)
    os.close(writing)
    with pytest.raises(OSError, match=r"larger than 1\.00 MiB"):
        read_input(f"/dev/fd/{reading}", 2**20, pipe=True)
    os.close(reading)
    os.waitpid(child, 0)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self) -> None:
        self.inner, self.characters = tiny_tokenizer(chat=True), 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.inner(text, **options)


def test_a_text_that_is_too_long_is_not_tokenized_whole() -> None:
    counting = Counting()
    assert has_more_tokens(counting, "word " * 10**6, 256)
    assert counting.characters < 2**18
    assert not has_more_tokens(counting, "word " * 40_000, 10**6)


def test_the_first_tokens_of_a_long_text_are_those_of_the_whole() -> None:
    counting, text = Counting(), "the quick brown fox " * 20_000
    ids = first_tokens(lambda part: counting(part)["input_ids"], text, 100)
    assert ids[:100] == tiny_tokenizer()(text)["input_ids"][:100]
    assert counting.characters < len(text) / 2


def test_samples_of_a_long_text_are_cut_from_pieces_of_it() -> None:
    counting = Counting()
    source = CalibrationText("t", "".join(f"{number} words " for number in range(400_000)))
    drawn = draw_samples(lambda text: counting(text)["input_ids"], [source], samples=4, tokens=64)
    assert [len(ids) for ids in drawn.ids] == [64] * 4
    assert counting.characters < len(source.content) / 4


@pytest.mark.parametrize("way", ["a prompt", "a conversation", "a bare text"])
def test_a_prompt_beyond_the_context_is_refused_before_it_is_tokenized(way: str, engine: Engine) -> None:
    text = "word " * 10**6
    asked: dict[str, Callable[[], Any]] = {
        "a prompt": lambda: engine.encode(text),
        "a conversation": lambda: engine.encode_chat([{"role": "user", "content": text}]),
        "a bare text": lambda: engine.encode(text, raw=True),
    }
    with pytest.raises(ContextError, match=r"has more than 256 tokens; .* reads at most 256"):
        asked[way]()


def test_a_prompt_beyond_the_memory_is_refused_before_it_is_tokenized(engine: Engine) -> None:
    small = replace(engine.opened, budget=2**12)
    with pytest.raises(BudgetError, match=r"has more than \d+ tokens, and 4.00 KiB hold no more"):
        small.prompts.encode("word " * 10**6, raw=True)


FIELDS: dict[str, Any] = {
    "num_labels": 10**9,
    "num_hidden_layers": 10**9,
    "vocab_size": 10**15,
    "head_dim": 10**12,
    "hidden_size": 2**70,
    "num_experts": 10**9,
    "max_position_embeddings": 2**62,
    "sub": {"sub": {"num_layers": 10**9}},
    "rope_theta": 10**300,
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_number_in_a_config_is_bounded_before_it_is_used(name: str, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "m"))
    facts = json.loads((model / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(facts | {name: FIELDS[name]}))
    if name == "num_labels":
        Engine(copy)  # which nothing needs
        return
    with pytest.raises(CheckpointError, match=r"the most is|cannot be used"):
        Engine(copy)


@pytest.fixture(autouse=True)
def _few_bytes() -> Iterator[None]:
    """What is read before a refusal stays small."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 if sys.platform == "darwin" else 2**10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 400 * 2**20


@pytest.mark.parametrize("variable", ["GRIFFIN_CACHE", "GRIFFIN_STATE", "GRIFFIN_CONFIG"])
@pytest.mark.parametrize("command", [["sessions"], ["models"], ["config"], ["mem-report", "--last"]], ids=" ".join)
def test_a_home_that_nobody_knows(variable: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "~nobody-of-that-name/griffin")
    refused(run(*command), "~nobody-of-that-name/griffin", "home folder")


@pytest.mark.parametrize("option", ["--model", "--prior"])
def test_a_home_that_nobody_knows_in_an_option(option: str, model: Path) -> None:
    common = () if option == "--model" else ("--model", model)
    refused(run("generate", *common, "--prompt", "a", option, "~nobody-of-that-name/x"), "~nobody-of-that-name/x")


def test_a_folder_that_is_a_link_to_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, rows = tmp_path / "loop", tmp_path / "rows.jsonl"
    loop.symlink_to(loop)
    rows.write_text('{"prompt": "a"}\n')
    refused(run("generate", "--model", model, "--input", rows, "--output", loop), "loop", "symbolic links")
    monkeypatch.setenv("GRIFFIN_CACHE", str(loop))
    answered = run("generate", "--model", model, "--prompt", "a", "--max-new-tokens", "1", "--sparsity", "0.5")
    assert answered.exit_code == 0, answered.output


def test_names_that_are_not_utf_8(model: Path, tmp_path: Path) -> None:
    rows, out = (tmp_path / os.fsdecode(name) for name in (b"\xff\xfe.jsonl", b"\xfe out.jsonl"))
    rows.write_text('{"prompt": "a"}\n')
    command = ("generate", "--model", model, "--input", rows, "--output", out, "--max-new-tokens", "1")
    for told in ("1 prompts answered", "answered already"):
        done = run(*command)
        assert done.exit_code == 0, done.output
        assert told in done.stderr


def test_settings_with_a_nul(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "griffin.toml").write_text('report = "a\\u0000b"')
    monkeypatch.setenv("GRIFFIN_CONFIG", str(tmp_path / "griffin.toml"))
    refused(run("generate", "--model", model, "--prompt", "a"), "report")


WITHOUT_END = {"line": b"x" * 400, "lines": b"a\\\n" * 100, "block": b'"""\n' + b"a\n" * 200}


@pytest.mark.parametrize("kind", WITHOUT_END)
def test_a_message_without_an_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_typed, "PROMPT", 200)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(WITHOUT_END[kind])))
    with pytest.raises(GriffinError, match="a message is larger than 200 B"):
        _typed.Lines().ask(str)
