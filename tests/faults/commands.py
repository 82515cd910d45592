"""Commands on tiny models that a fault is put into, and what must hold afterwards."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from griffin_offload.cli._outcome import UNFORESEEN, describe
from griffin_offload.cli.main import griffin
from tiny import text_paragraph, tiny_checkpoint

from griffin_offload.errors import GriffinError
from griffin_offload.workspace import NAME

from .injection import CLEANING, Faults

PRUNED = ("--sparsity", "0.5", "--rest", "drop", "--prior", "off", "--no-fold")
VARIABLES = ("GRIFFIN_CACHE", "GRIFFIN_STATE", "TMPDIR")


@dataclass(frozen=True)
class Inputs:
    """What all commands read, in one folder that none may change."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def make_inputs(folder: Path, layers: int = 2) -> Inputs:
    tiny_checkpoint(folder / "model", "llama", chat=True, num_hidden_layers=layers)
    texts = {
        "p.txt": "What is the sky?\n",
        "long.txt": text_paragraph() * 2,
        "rows.jsonl": "".join(json.dumps({"prompt": text}) + "\n" for text in ("Say one", "Say two", "Say three")),
        "choice.jsonl": '{"context": "The sky is", "choices": ["blue", "a"], "answer": 0}\n' * 2,
        "articles.jsonl": json.dumps({"article": "The sky is blue.", "summary_gt": "blue"}) + "\n",
        "texts.jsonl": "".join(json.dumps({"text": text_paragraph(30 + i)}) + "\n" for i in range(4)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    inputs = Inputs(folder)
    gguf = ("--format", "gguf", "--out", inputs["model.gguf"])
    prior = ("--samples", "2", "--tokens", "16", "--prior-out", inputs["prior.safetensors"])
    common = ("export-pruned", "--model", inputs["model"])
    for arguments in (
        (*common, "--prompt", "The sky is blue", "--sparsity", "0", *gguf),
        (*common, "--calibration", inputs["texts.jsonl"], *prior),
    ):
        result = CliRunner().invoke(griffin, arguments)
        assert result.exit_code == 0, result.output
    return inputs


@dataclass(frozen=True)
class Command:
    """`arguments(inputs, place)`: a command line; or `call`, which does the work of one through the library. `read`:
    what it made, to compare; `before`: a command that is run once before it."""

    arguments: Callable[[Inputs, Path], tuple[str, ...]] = lambda inputs, place: ()
    read: Callable[[Path, str], Any] = lambda place, stdout: stdout
    before: Callable[[Inputs, Path], tuple[str, ...]] | None = None
    call: Callable[[Inputs, Path], None] | None = None


@dataclass
class Outcome:
    code: int
    stdout: str = ""
    stderr: str = ""
    traceback: BaseException | None = field(default=None, repr=False)


def export(*options: str, out: str = "out") -> Callable[[Inputs, Path], tuple[str, ...]]:
    return lambda inputs, place: (
        *("export-pruned", "--model", inputs["model"], "--prompt-file", inputs["p.txt"], *PRUNED[:2], *PRUNED[4:]),
        *(*options, "--out", str(place / out)),
    )


def answers(place: Path, stdout: str) -> Any:
    rows = [json.loads(line) for line in (place / "o.jsonl").read_text().splitlines()]
    return [(row["id"], row.get("text")) for row in rows]


def content(*names: str) -> Callable[[Path, str], Any]:
    """Of files and folders."""
    return lambda place, stdout: [hashes(place / name) for name in names]


def rows_of(place: Path, stdout: str) -> Any:
    return (place / "o.jsonl").read_text()


def save_session(inputs: Inputs, place: Path) -> None:
    """A chat of one turn: its session, its conversation, and both read back."""
    from griffin_offload.chat import Chat, Conversation
    from griffin_offload.engine import Engine
    from griffin_offload.options import Decoding, Pruning
    from griffin_offload.session import open_session
    from griffin_offload.session import save_session as save

    pruning, decoding = Pruning(sparsity=0.5, rest="drop", prior="off", fold=False), Decoding(2, greedy=True)
    chat = Chat(Engine(inputs["model"]), pruning, decoding)
    chat.ask("Hello")
    save(chat, "mine")
    chat.conversation.save(place / "chat.json")
    Conversation.load(place / "chat.json")
    open_session("mine").resume(chat.engine, pruning, decoding)


def saved(place: Path, stdout: str) -> Any:
    from griffin_offload.session import open_session

    return json.loads((place / "chat.json").read_text()), open_session("mine").facts["conversation"]


ONE = ("--greedy", "--max-new-tokens", "3")
COMMANDS = {
    "generate": Command(
        lambda i, p: (
            *("generate", "--model", i["model"], "--prompt-file", i["p.txt"], *PRUNED, *ONE),
            *("--report", str(p / "page.html")),
        ),
        lambda place, stdout: (stdout, (place / "page.html").stat().st_size > 5000),
    ),
    "generate --prior": Command(
        lambda i, p: (
            *("generate", "--model", i["model"], "--prompt-file", i["p.txt"], *PRUNED[:4], *ONE),
            *("--prior", i["prior.safetensors"]),
        )
    ),
    "generate --input": Command(
        lambda i, p: (
            *("generate", "--model", i["model"], "--input", i["rows.jsonl"], "--output", str(p / "o.jsonl")),
            *(*PRUNED, *ONE),
        ),
        answers,
    ),
    "generate a .gguf": Command(
        lambda i, p: ("generate", "--model", i["model.gguf"], "--prompt-file", i["p.txt"], *PRUNED, *ONE),
    ),
    "pull": Command(lambda i, p: ("pull", i["model.gguf"]), lambda place, stdout: bool(stdout)),
    "export": Command(export(), content("out")),
    "export --force": Command(export("--force"), content("out"), before=export("--seed", "1")),
    "export gguf": Command(export("--format", "gguf", out="o.gguf"), content("o.gguf")),
    "export gguf --force": Command(
        export("--format", "gguf", "--force", out="o.gguf"),
        content("o.gguf"),
        before=export("--format", "gguf", "--seed", "1", out="o.gguf"),
    ),
    "export --calibration": Command(
        lambda i, p: (
            *("export-pruned", "--model", i["model"], "--calibration", i["texts.jsonl"], "--samples", "3"),
            *("--tokens", "24", "--host-memory", "1KiB", "--out", str(p / "out"), "--prior-out", str(p / "prior.st")),
        ),
        content("out"),
    ),
    "calibrate": Command(
        lambda i, p: (
            *("calibrate", "--model", i["model"], "--data", i["long.txt"], "--prompt-tokens", "16"),
            *("--continue-tokens", "4", "--windows", "1", "--json"),
        ),
        lambda place, stdout: json.loads(stdout)["kl"],
    ),
    "eval perplexity": Command(
        lambda i, p: (
            *("eval", "perplexity", "--model", i["model"], "--data", i["long.txt"], "--windows", "1"),
            *("--prompt-tokens", "16", "--continue-tokens", "4"),
        ),
    ),
    "eval choice": Command(
        lambda i, p: (
            *("eval", "choice", "--model", i["model"], "--data", i["choice.jsonl"], "--out", str(p / "o.jsonl")),
        ),
        rows_of,
    ),
    "eval summarise": Command(
        lambda i, p: (
            *("eval", "summarise", "--model", i["model"], "--data", i["articles.jsonl"], "--out", str(p / "o.jsonl")),
            *("--max-new-tokens", "3"),
        ),
        rows_of,
    ),
    "plot": Command(
        lambda i, p: (
            *("plot", "statistic", "--model", i["model"], "--prompt-file", i["p.txt"], "--out", str(p / "o.svg")),
        ),
        lambda place, stdout: (place / "o.svg").stat().st_size > 5000,
    ),
    "mem-report": Command(
        lambda i, p: ("mem-report", "--model", i["model"], "--prompt-tokens", "32"),
        lambda place, stdout: "peak" in stdout,
    ),
    "a session": Command(call=save_session, read=saved),
}


def hashes(path: Path) -> dict[str, str]:
    """Everything below a folder, or a file; {} where there is none."""
    paths = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest() for each in paths if each.is_file()
    }


def changed(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether a file below a folder was changed, without reading it."""
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@contextmanager
def places(place: Path) -> Iterator[None]:
    """The cache, the state and the folder for temporary files are in `place`."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    for name in VARIABLES:
        (place / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(place / name)
    import tempfile

    tempfile.tempdir = None
    try:
        yield
    finally:
        tempfile.tempdir = None
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(command: Command, inputs: Inputs, place: Path) -> Outcome:
    if command.call:
        try:
            command.call(inputs, place)
        except (GriffinError, OSError) as error:
            return Outcome(1, stderr=f"error: {describe(error)}\n")
        return Outcome(0)
    return run_line(command.arguments(inputs, place))


def run_line(arguments: tuple[str, ...]) -> Outcome:
    result = CliRunner().invoke(griffin, arguments)
    unforeseen = result.exception if result.exit_code == UNFORESEEN else None
    if not isinstance(result.exception, SystemExit | None):
        unforeseen = result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr, unforeseen)


def leftovers(place: Path) -> list[str]:
    return [str(path) for path in place.rglob(".griffin-*") if NAME.fullmatch(path.name)]


class Trials:
    """Trials of one command. `calls`: how many of the system's it makes."""

    def __init__(self, name: str, inputs: Inputs, scratch: Path) -> None:
        self.command, self.inputs, self._scratch = COMMANDS[name], inputs, scratch
        self._inputs_before = changed(inputs.folder)
        with self._place() as place:
            self._run(self.command)  # whatever is loaded once for all, is loaded
        with self._place() as place, Faults() as faults:
            outcome = self._run(self.command)
            assert outcome.code == 0, outcome
        self.calls, self.names = faults.calls, faults.names
        with self._place() as place:
            outcome = self._run(self.command)
            self.right = self.command.read(place, outcome.stdout)

    def trial(self, at: int, number: int, everything: bool = False) -> str | None:
        """What is wrong after the call `at` failed with `number`; None for nothing."""
        with self._place() as place:
            earlier = hashes(place)
            with Faults(at, number, everything) as faults:
                outcome = self._run(self.command)
            wrong = list(self._wrong(place, outcome, faults, earlier))
            again = self._run(self.command)
            if again.code != 0 or again.traceback:
                wrong.append(f"the same command again: {again.code} {again.stderr[-300:]} {again.traceback!r}")
            else:
                with suppress(OSError, ValueError, GriffinError):
                    if self.command.read(place, again.stdout) == self.right:
                        return self._told(wrong, place, faults)
                wrong.append("the same command again made something else")
            return self._told(wrong, place, faults)

    def _told(self, wrong: list[str], place: Path, faults: Faults) -> str | None:
        if left := leftovers(place):
            wrong.append(f"left after the same command again: {left}")
        if changed(self.inputs.folder) != self._inputs_before:
            wrong.append("an input has changed")
        return f"call {faults.at} ({faults.hit}), {faults.error}: {'; '.join(wrong)}" if wrong else None

    def _wrong(self, place: Path, outcome: Outcome, faults: Faults, earlier: dict[str, str]) -> Iterator[str]:
        if outcome.traceback:
            yield f"{type(outcome.traceback).__name__}: {outcome.traceback}"
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        if outcome.code not in (0, 1) or len(errors) != outcome.code or "Traceback" in outcome.stderr:
            yield f"exit {outcome.code}, {outcome.stderr[-300:]!r}"
        if (left := leftovers(place)) and faults.hit not in CLEANING:
            yield f"left {left}"
        if outcome.code == 1:
            now = hashes(place)
            gone = [name for name, sha in earlier.items() if now.get(name) != sha and not name.startswith(VARIABLES)]
            if gone:
                yield f"what was there before has changed: {gone[:3]}"

    def _run(self, command: Command) -> Outcome:
        return run(command, self.inputs, self._here)

    @contextmanager
    def _place(self) -> Iterator[Path]:
        """An empty folder, with what `before` makes."""
        self._here = self._scratch / "place"
        shutil.rmtree(self._here, ignore_errors=True)
        self._here.mkdir(parents=True)
        with places(self._here):
            if self.command.before:
                outcome = run_line(self.command.before(self.inputs, self._here))
                assert outcome.code == 0, outcome
            yield self._here
