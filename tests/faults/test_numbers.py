"""Numbers that no option means: of hundreds of digits, next to nothing, infinite, negative, in other scripts. Each ends
in one line, or is taken; none is a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from griffin_offload.cli import _opening
from griffin_offload.cli._settings import walk
from griffin_offload.cli.main import griffin
from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import GriffinError, NumericError, OptionError
from griffin_offload.options import Decoding, Placement, Pruning, declared
from griffin_offload.units import parse_budget, parse_bytes

pytestmark = pytest.mark.fault

NUMBERS = {
    "400 digits": "9" * 400,
    "5000 digits": "9" * 5000,
    "400 digits below 0": "-" + "9" * 400,
    "denormal": "1e-320",
    "beyond a float": "1e400",
    "NaN": "nan",
    "infinite": "inf",
    "infinite below 0": "-inf",
    "below 0": "-1",
    "20 digits": "1" + "0" * 20,
    "2^63": str(2**63),
    "another script's": "\u0663",
    "half": "\u00bd",
    "empty": "",
    "a size": "1e400GiB",
    "nothing": "0",
    "hexadecimal": "0x10",
}
TEXTS = (
    "prompt",
    "prompt_file",
    "data",
    "out",
    "text",
    "prior",
    "api_key",
    "host",
    "alias",
    "source",
    "output",
    "stop",
)
COMMANDS = {
    "generate": ["--prompt", "Hello you"],
    "chat": [],
    "serve": [],
    "export-pruned": ["--calibration", "t.txt", "--out", "o"],
    "calibrate": [],
    "eval perplexity": ["--data", "t.txt"],
    "eval choice": ["--data", "c.jsonl"],
    "eval compare": ["--text", "t.txt", "--out", "o.jsonl"],
    "plot flocking": ["--prompt-file", "t.txt", "--out", "a.png"],
    "plot jaccard": ["--data", "t.txt", "--out", "a.png"],
    "mem-report": ["--model", "m"],
}


# Every command is imported before a test puts something in the place of what they import.
EVERY = {" ".join(path): command for path, command in walk(griffin, click.Context(griffin))}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(griffin, list(map(str, arguments)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("numbers") / "m", "llama", chat=True)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the commands read; none opens a model."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("some words " * 50)
    Path("c.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')

    def opens(*arguments: object) -> None:
        raise GriffinError("opened")

    monkeypatch.setattr(_opening, "open_engine", opens)
    monkeypatch.setattr("griffin_offload.cli.mem_report.open_engine", opens)


def numeric(command: str) -> list[str]:
    """The flags of a command's options that take something else than a text."""
    options = [each for each in EVERY[command].params if isinstance(each, click.Option) and not each.is_flag]
    return [each.opts[0] for each in options if each.name not in TEXTS and not isinstance(each.type, click.Path)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.usefixtures("inputs")
def test_every_option_takes_a_number_or_refuses_it(command: str, kind: str) -> None:
    for flag in numeric(command):
        if flag in ("--model", "--system", "--resume"):
            continue
        result = run(*command.split(), *COMMANDS[command], f"{flag}={NUMBERS[kind]}")
        assert isinstance(result.exception, SystemExit), (flag, result.exception)
        assert result.exit_code in (0, 1, 2), flag
        assert result.stderr.count("\n") <= 1, (flag, result.stderr)


@pytest.mark.parametrize("value", [10**400, 2**63, -1, -(10**30), float("nan"), float("inf"), -0.5, 1e400])
@pytest.mark.parametrize("group", [Pruning, Decoding, Placement])
def test_a_declared_range_holds_in_python_too(group: type[Any], value: float) -> None:
    for name, told, default in declared(group):
        if not told.allowed or name.startswith("ffn_skip") or isinstance(default, tuple):
            continue
        with pytest.raises(OptionError, match=name):
            group(**{name: value})


@pytest.mark.parametrize("size", ["0", "0GiB", "0.0GiB"])
def test_no_memory_is_no_default(size: str, model: Path) -> None:
    with pytest.raises(OptionError, match="a model needs some"):
        parse_budget(size)
    with pytest.raises(OptionError, match="device_memory"):
        Engine(model, device_memory=size)
    result = run("mem-report", "--device-memory", size, "--json")
    assert result.exit_code == 1
    assert "device_memory" in result.stderr


@pytest.mark.parametrize(
    "size", ["9" * 400, "1e400GiB", "9" * 5000 + "GiB", "-1", "nan", "inf", "\u0663GiB", "8EiB", "1_0"]
)
def test_a_size_that_is_none(size: str) -> None:
    with pytest.raises(OptionError):
        parse_bytes(size)


@pytest.mark.parametrize("temperature", ["1e-40", "1e-320", "1e-5"])
def test_a_temperature_next_to_nothing_is_greedy(temperature: str, model: Path) -> None:
    common = ("generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", 4, "--json")
    greedy = json.loads(run(*common, "--greedy").stdout)["token_ids"]
    assert json.loads(run(*common, "--temperature", temperature, "--seed", 1).stdout)["token_ids"] == greedy


GENERATION = {
    "a temperature next to nothing": {"do_sample": True, "temperature": 1e-40},
    "a penalty next to nothing": {"do_sample": True, "repetition_penalty": 1e-40},
    "a penalty beyond a float": {"do_sample": True, "exponential_decay_length_penalty": [0, 1e300]},
    "a token of 400 digits": {"eos_token_id": 10**30},
    "tokens to suppress without an end": {"suppress_tokens": [2**40]},
    "a length without an end": {"max_length": 10**18, "max_new_tokens": 10**18},
    "top_k without an end": {"do_sample": True, "top_k": 10**30},
}


@pytest.mark.parametrize("what", GENERATION)
def test_a_generation_config_with_such_a_number(what: str, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "m"))
    name = copy / "generation_config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | GENERATION[what]))
    result = run("generate", "--model", copy, "--prompt", "Hello", "--max-new-tokens", 3, "--quiet")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") <= 1


def test_predictions_that_overflow_are_told(model: Path) -> None:
    engine = Engine(model)
    with pytest.raises(NumericError, match="draws no token"):
        engine.generate(engine.encode("Hello"), do_sample=True, repetition_penalty=1e-44, max_new_tokens=3)
