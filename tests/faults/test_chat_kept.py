"""A chat never loses its conversation: whatever is typed, set, damaged, full or killed, what was said can be saved."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from command_line import PYTHON, Run
from griffin_offload.cli import _chat_commands, chat
from griffin_offload.cli._talk import Talk
from griffin_offload.cli.main import griffin
from tiny import tiny_checkpoint

from griffin_offload import Engine, GriffinError
from griffin_offload.chat import Chat, Conversation
from griffin_offload.checkpoint.one_file import read_facts, write_file
from griffin_offload.errors import BudgetError, CheckpointError, NumericError, OptionError, PromptError
from griffin_offload.options import Decoding, Pruning
from griffin_offload.session import open_session, save_session, session_names, session_path

pytestmark = pytest.mark.fault


class Panic(BaseException):
    """As the Rust libraries' own, which is no Exception."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRIFFIN_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path / "state"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("kept") / "llama", "llama", chat=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder)


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(griffin, [str(argument) for argument in arguments])


class Typed:
    """Lines that are typed; an exception among them is raised in place of one."""

    terminal = False

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = list(lines)

    def ask(self, status: Callable[[], str]) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def close(self) -> None: ...


@pytest.fixture
def talk(engine: Engine) -> Iterator[Talk]:
    """A chat in which one question has been answered."""
    made = Talk(Chat(engine, Pruning(0.5), Decoding(max_new_tokens=4, greedy=True)), terminal=False)
    say(made, "one")
    yield made
    engine.unload()


def say(talk: Talk, *lines: str | BaseException) -> None:
    chat.converse(talk, Typed(*lines))  # type: ignore[arg-type]


def questions(conversation: Conversation) -> list[str]:
    turns = conversation.messages
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [turn["content"] for turn in turns[::2]]


def in_session(name: str) -> Conversation:
    return Conversation.from_json(open_session(name).facts["conversation"])


def resume(name: str, engine: Engine) -> Chat:
    found = open_session(name)
    return found.resume(engine, found.options(Pruning), found.options(Decoding))


def can_be_saved(talk: Talk, folder: Path, *expected: str) -> None:
    """The conversation is that of the `expected` questions, and is in a file and in a session as it is here."""
    assert questions(talk.chat.conversation) == list(expected)
    say(talk, f"/save {folder / 'kept.json'}")
    assert Conversation.load(folder / "kept.json").messages == talk.chat.conversation.messages
    save_session(talk.chat, "kept")
    assert in_session("kept").messages == talk.chat.conversation.messages


# Errors in a turn

ERRORS: dict[str, BaseException] = {
    "budget": BudgetError("too little"),
    "prompt": PromptError("not for this model"),
    "numbers": NumericError("logits are infinite"),
    "changed_on_disk": CheckpointError("the file has changed"),
    "option": OptionError("no"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "memory": MemoryError(),
    "torch": RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
    "assertion": AssertionError(),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "end_of_file": EOFError(),
    "panic": Panic("index out of bounds"),
    "interrupt": KeyboardInterrupt(),
}


def failing(error: BaseException, moment: str) -> Callable[..., Any]:
    def generate(*arguments: Any, **keywords: Any) -> Any:
        if moment == "after_text":
            keywords["on_text"]("half an ans")
        raise error

    return generate


@pytest.mark.parametrize("moment", ["at_once", "after_text"])
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_in_a_turn(
    kind: str,
    moment: str,
    talk: Talk,
    tmp_path: Path,
    foreseen: list[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(talk.chat.engine, "generate", failing(ERRORS[kind], moment))
        say(talk, "two")
    foreseen.clear()
    told = capsys.readouterr().err
    assert "taken back" in told
    assert (told.count("error: ") == 1) == (kind != "interrupt")
    say(talk, "/retry")
    can_be_saved(talk, tmp_path, "one", "two")


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_while_the_last_question_is_answered_again(
    kind: str, talk: Talk, tmp_path: Path, foreseen: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = talk.chat.conversation.messages
    with monkeypatch.context() as patch:
        patch.setattr(talk.chat.engine, "generate", failing(ERRORS[kind], "after_text"))
        say(talk, "/retry")
    foreseen.clear()
    assert talk.chat.conversation.messages == before
    can_be_saved(talk, tmp_path, "one")


@pytest.mark.parametrize("point", ["generate", "encode_chat", "add_assistant", "take"])
def test_ctrl_c_at_any_step_of_a_turn(point: str, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    owner = talk.chat.engine if point in ("generate", "encode_chat") else Conversation
    with monkeypatch.context() as patch:
        patch.setattr(owner, point, interrupt)
        say(talk, "two", "/retry")
    can_be_saved(talk, tmp_path, "one")
    say(talk, "three")
    can_be_saved(talk, tmp_path, "one", "three")


@pytest.mark.parametrize("fails", ["_tell", "context_note", "footer"])
def test_an_error_after_the_answer_keeps_the_answer(
    fails: str, talk: Talk, tmp_path: Path, foreseen: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: Any) -> None:
        raise KeyError(fails)

    with monkeypatch.context() as patch:
        if fails == "_tell":
            patch.setattr(talk, "_tell", fault)
        else:
            patch.setattr(f"griffin_offload.cli._talk.{fails}", fault)
        say(talk, "two")
    foreseen.clear()
    can_be_saved(talk, tmp_path, "one", "two")


# Settings

SETTINGS = [
    "max_new_tokens " + "9" * 400,
    "max_new_tokens 9223372036854775807",
    "temperature 1e-320",
    "temperature 1e308",
    "temperature -0",
    "temperature nan",
    "top_p 1e-320",
    "top_k 9223372036854775807",
    "seed 99999999999999999999",
    "sparsity 0.1,0.2",
    "sparsity 1",
    "sparsity " + ",".join(["0.5"] * 1000),
    "prior /nowhere/at/all",
    "prior /dev/zero",
    "prior .",
    "prior_weight 0.5",
    "allocation sensitivity",
    "ffn_skip_cold 999999999999,99999999999",
    "ffn_skip 1",
    "fold_strength 1e-320",
    "fold_strength 1e308",
    'stop ["' + "x" * 10_000 + '"]',
    "stop " + "[" * 100_000,
    "refresh 1",
    "lossless on",
    "compile on",
    "method griffin",
    "selection random",
    "resident_dtype int4",
    "rest int8",
    "nonsense",
    "\x1b[2J 1",
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda text: ascii(text[:40]))
def test_any_setting_leaves_the_chat_usable(
    setting: str, talk: Talk, tmp_path: Path, foreseen: list[BaseException]
) -> None:
    say(talk, "/set greedy off", f"/set {setting}", "two", "/retry")
    found = [error for error in foreseen if not isinstance(error, RuntimeError)]  # torch's word for odd numbers
    foreseen.clear()
    assert not found
    assert questions(talk.chat.conversation) in (["one"], ["one", "two"])
    if len(talk.chat.conversation) > 2:  # whose answer may have filled the context
        say(talk, "/undo")
    say(talk, "three")
    can_be_saved(talk, tmp_path, "one", "three")


def test_settings_that_cannot_work_are_set_back(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(talk, "/set max_new_tokens 5", "/set sparsity 0.1,0.2", "two")
    assert "set back, as at the last answer: sparsity 0.5, max_new_tokens 4" in capsys.readouterr().err
    assert talk.chat.pruning == Pruning(0.5)
    say(talk, "/set max_new_tokens 3", "/set heat 1", "/save", "x" * 3000)
    assert talk.chat.decoding.max_new_tokens == 3, "an error that is not the settings' changes none"
    say(talk, "/retry", "/undo", "/set max_new_tokens 4", "two")
    can_be_saved(talk, tmp_path, "two")


# Files


@pytest.mark.parametrize(
    "name",
    ["a\0b", "x" * 300, "/nowhere/at/all/talk.json", ".", "..", "/dev/full/x", "/proc/1/nothing", "~nobody/talk", " "],
    ids=ascii,
)
@pytest.mark.parametrize("command", ["/save", "/load", "/export", "/session", "/read"])
def test_a_name_that_cannot_be_written_or_read(
    command: str, name: str, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = talk.chat.conversation.messages
    say(talk, f"{command} {name}")
    told = capsys.readouterr().err
    assert "error: " in told or (command == "/session" and name == " ")
    assert talk.chat.conversation.messages == before
    can_be_saved(talk, tmp_path, "one")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can be larger than 10 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("command", ["/save {}/talk.json", "/session talk"])
def test_a_full_disk_leaves_the_old_file(
    command: str, talk: Talk, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    say(talk, command.format(tmp_path))
    path = session_path("talk") if "session" in command else tmp_path / "talk.json"
    before = path.read_bytes()
    say(talk, "two")
    request.getfixturevalue("small_disk")
    capsys.readouterr()
    say(talk, command.format(tmp_path))
    assert "error: cannot save" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [each for each in path.parent.iterdir() if each.is_file()] == [path]
    assert questions(talk.chat.conversation) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"format": 1}', None])
def test_a_conversation_that_cannot_be_loaded_replaces_nothing(
    content: bytes | None, talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.mkdir() if content is None else path.write_bytes(content)
    say(talk, f"/load {path}", f"/save {path}")
    assert capsys.readouterr().err.count("error: ") == 2
    assert content is None or path.read_bytes() == content
    can_be_saved(talk, tmp_path, "one")


def test_half_a_character_in_a_conversation_is_told_at_once(talk: Talk, tmp_path: Path, capsys: Any) -> None:
    content = {**talk.chat.conversation.to_json(), "system": "\ud800"}
    (tmp_path / "other.json").write_text(json.dumps(content))
    say(talk, f"/load {tmp_path / 'other.json'}")
    assert "the system text is not text" in capsys.readouterr().err
    can_be_saved(talk, tmp_path, "one")


def test_a_model_that_is_gone_keeps_its_chat(tmp_path: Path, folder: Path, foreseen: list[BaseException]) -> None:
    own = tiny_checkpoint(tmp_path / "own", "llama", chat=True)
    made = Talk(Chat(Engine(own), Pruning(0.5), Decoding(max_new_tokens=4, greedy=True)), terminal=False)
    say(made, "one")
    for path in own.iterdir():
        path.unlink()
    say(made, "two", "/retry")
    foreseen.clear()
    asked = questions(made.chat.conversation)
    can_be_saved(made, tmp_path, *asked)
    assert asked[0] == "one"
    resumed = open_session("kept").resume(Engine(folder), Pruning(), Decoding())
    assert resumed.conversation.messages == made.chat.conversation.messages


# The end


@pytest.mark.parametrize(
    "end",
    [SystemExit(143), BrokenPipeError(), RuntimeError("in the terminal"), Panic(), OSError(errno.EIO, "I/O")],
    ids=repr,
)
@pytest.mark.parametrize("named", [False, True], ids=["without_a_session", "with_one"])
def test_what_ends_a_chat_unasked_saves_it(
    end: BaseException, named: bool, talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.session = "mine" if named else None
    with pytest.raises(type(end)), chat.kept(talk):
        say(talk, "two", end)
    (name,) = session_names()
    assert (name == "mine") == named
    assert f"griffin chat --resume {name}" in capsys.readouterr().err
    again = resume(name, talk.chat.engine)
    assert questions(again.conversation) == ["one", "two"]
    assert again.decoding == talk.chat.decoding
    assert again.ask("three").text


def test_a_signal_in_a_turn_tells_the_question(talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(talk.chat.engine, "generate", failing(SystemExit(129), "after_text"))
    with pytest.raises(SystemExit), chat.kept(talk):
        say(talk, "two")
    assert "not answered: two" in capsys.readouterr().err
    assert len(session_names()) == 1


@pytest.mark.usefixtures("capsys")
def test_where_no_session_can_be_saved_a_file_is(
    talk: Talk, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state.write_text("not a folder")
    talk.session = "mine"
    with pytest.raises(GriffinError), chat.kept(talk):
        say(talk, "two")
    (path,) = tmp_path.glob("griffin-rescued-*.json")
    assert f"/load {path}" in capsys.readouterr().err
    assert questions(Conversation.load(path)) == ["one", "two"]


def ended(patch: pytest.MonkeyPatch, write: Callable[[str], int]) -> None:
    patch.setattr(sys.stderr, "write", write)
    raise SystemExit(129)


def test_a_terminal_that_is_gone_does_not_stop_the_save(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(SystemExit), chat.kept(talk):
        ended(patch, gone)
    assert len(session_names()) == 1


def test_nothing_said_saves_nothing(engine: Engine) -> None:
    made = Talk(Chat(engine), terminal=False)
    with pytest.raises(SystemExit), chat.kept(made):
        raise SystemExit(143)
    assert session_names() == []


def test_a_chat_that_ends_as_asked_leaves_no_session(talk: Talk) -> None:
    with chat.kept(talk):
        say(talk, "two", "/exit")
    talk.leaving = False
    with pytest.raises(KeyboardInterrupt), chat.kept(talk):
        say(talk, KeyboardInterrupt())
    assert session_names() == []


# Damaged sessions


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda facts: {name: value for name, value in {**facts, **values}.items() if value is not ...}


EMPTY = {"format": "griffin-conversation", "version": 1, "messages": []}
DAMAGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no_model": changed(model=...),
    "model_a_number": changed(model=5),
    "no_tokens": changed(tokens=...),
    "tokens_huge": changed(tokens=10**400),
    "tokens_negative": changed(tokens=-1),
    "tokens_a_text": changed(tokens="many"),
    "conversation_a_list": changed(conversation=[]),
    "conversation_of_numbers": changed(conversation={**EMPTY, "messages": [1, 2]}),
    "half_a_character": changed(conversation={**EMPTY, "system": "\ud800"}),
    "pruning_a_list": changed(pruning=[1]),
    "sparsity_a_text": lambda facts: {**facts, "pruning": {**facts["pruning"], "sparsity": "half"}},
    "sparsity_huge": lambda facts: {**facts, "pruning": {**facts["pruning"], "sparsity": 10**400}},
    "unknown_rest": lambda facts: {**facts, "pruning": {**facts["pruning"], "rest": "int1"}},
    "prior_an_object": lambda facts: {**facts, "pruning": {**facts["pruning"], "prior": {}}},
    "temperature_a_text": lambda facts: {**facts, "decoding": {**facts["decoding"], "temperature": "hot"}},
    "half_a_token": lambda facts: {**facts, "decoding": {**facts["decoding"], "max_new_tokens": 1.5}},
    "stop_of_numbers": lambda facts: {**facts, "decoding": {**facts["decoding"], "stop": [1]}},
    "cold_of_one": lambda facts: {**facts, "pruning": {**facts["pruning"], "ffn_skip_cold": [1]}},
    "room_huge": lambda facts: {**facts, "turns": {**facts["turns"], "room": 10**15}},
    "room_a_text": lambda facts: {**facts, "turns": {**facts["turns"], "room": "much"}},
    "no_room": lambda facts: {**facts, "turns": {}},
    "lengths_huge": lambda facts: {**facts, "turns": {**facts["turns"], "lengths": {"0": 10**30}}},
    "lengths_of_no_layer": lambda facts: {**facts, "turns": {**facts["turns"], "lengths": {"99": 1}}},
    "kept_huge": lambda facts: {**facts, "turns": {**facts["turns"], "kept": [["inf"]]}},
    "points_a_list": lambda facts: {**facts, "turns": {**facts["turns"], "points": [1]}},
    "precision_unknown": lambda facts: {**facts, "turns": {**facts["turns"], "precision": {"kept": "int1"}}},
    "tensors_of_numbers": changed(tensors=[1]),
    "no_tensors": changed(tensors=[]),
    "a_newer_version": changed(version=10**400),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_session_is_refused_and_the_others_are_listed(
    kind: str, talk: Talk, engine: Engine, run: Run
) -> None:
    save_session(talk.chat, "good")
    session = save_session(talk.chat, "bad")
    tensors = {"x": torch.zeros(3)} if kind == "no_tensors" else {}
    facts = DAMAGED[kind](read_facts(session.path))
    write_file(session.path, tensors, facts)
    with pytest.raises(GriffinError) as refused:
        resume("bad", engine)
    assert "bad" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 900
    for row in json.loads(run("sessions", "--json").stdout):
        assert row["name"] == "bad" or row["messages"] == 2
    assert "good" in run("sessions").stdout
    assert talk.chat.ask("two").text


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\0" * 100, (2**60).to_bytes(8, "little") + b"{}", None, ...])
def test_what_is_no_session_is_listed_as_one_that_cannot_be_read(content: Any, talk: Talk, run: Run) -> None:
    save_session(talk.chat, "good")
    path = session_path("bad")
    if content is None:
        path.mkdir()
    elif content is ...:
        path.symlink_to("/nowhere")
    else:
        path.write_bytes(content)
    if content is not ...:
        with pytest.raises(GriffinError, match="the session bad cannot be read"):
            open_session("bad")
        assert "cannot be read" in run("sessions").stdout
    assert "good" in run("sessions").stdout


def test_a_session_of_the_far_future_is_listed(talk: Talk, run: Run) -> None:
    path = save_session(talk.chat, "good").path
    try:
        os.utime(path, (2**55, 2**55))
    except OSError:
        pytest.skip("this file system has no such times")
    assert run("sessions").exit_code == 0
    assert run("sessions", "--json").exit_code == 0


# Anything at all


def commands(random: random.Random, folder: Path) -> Iterator[str]:
    """Lines that people, or cats, may type."""
    settings = [setting for setting in SETTINGS if not setting.startswith(("refresh", "lossless", "compile", "stop ["))]
    names = [*_chat_commands.COMMANDS, *_chat_commands.ALIASES, "/", "//", "/ ", "/nonsense", "/SET", "/\x1b"]
    names = [name for name in names if name not in ("/exit", "/quit", "/bye")]
    words = [
        "",
        " ",
        "none",
        "on",
        "off",
        "\0",
        "../..",
        "~",
        "~x",
        "'",
        '"',
        "talk.json",
        "/dev/null",
        "x" * 500,
        "☃",
        "\u202e",
    ]
    for name in ("max_new_tokens 2", "greedy on", "temperature none", "sparsity 0.5", "rest auto", "top_k none"):
        yield f"/set {name}"
    for _ in range(300):
        kind = random.random()
        if kind < 0.25:
            yield random.choice(["hello", "a", "☃ snow", "x" * 300, "<|end|>", "\u202e", "\n\n", "{{ 7 * 7 }}"])
        elif kind < 0.5:
            yield f"/set {random.choice(settings)}"
        elif kind < 0.6:
            yield f"/set {random.choice(settings).split()[0]} none"
        else:
            yield f"{random.choice(names)} {random.choice(words)}".strip() if kind < 0.95 else f"/save {folder}/f.json"


def test_300_lines_of_anything(
    engine: Engine, tmp_path: Path, foreseen: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Talk(Chat(engine), terminal=False)
    answered: list[tuple[str, str]] = []
    ask = made.chat._answer

    def listen(question: str, again: bool, *callbacks: Any) -> Any:
        answer = ask(question, again, *callbacks)
        if again:
            answered.pop()
        answered.append((question, answer.reply or answer.text))
        return answer

    monkeypatch.setattr(made.chat, "_answer", listen)
    for line in commands(random.Random(21), tmp_path):
        said = len(made.chat.conversation)
        say(made, line)
        if (now := len(made.chat.conversation)) < said or line.startswith("/load"):  # taken back, forgotten, loaded
            turns = [turn["content"] for turn in made.chat.conversation.messages if turn["role"] != "system"]
            answered = list(zip(turns[::2], turns[1::2], strict=True))
        assert now == 2 * len(answered), line
    assert not [error for error in foreseen if not isinstance(error, RuntimeError)], (
        "torch's words for odd numbers alone"
    )
    foreseen.clear()
    made.chat.conversation.system = None
    can_be_saved(made, tmp_path, *[question for question, _ in answered])
    say(made, "/clear", "the last one", "/retry")
    can_be_saved(made, tmp_path, "the last one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_chat_that_can_be_resumed(number: int, folder: Path, state: Path) -> None:
    environment = {**os.environ, "GRIFFIN_STATE": str(state), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*PYTHON, "chat", "--model", str(folder), "--greedy", "--max-new-tokens", "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    (name,) = session_names()
    assert f"griffin chat --resume {name}" in told
    assert questions(in_session(name)) == ["one"]


def test_two_chats_of_one_name_are_two_sessions(engine: Engine) -> None:
    first, second = (Talk(Chat(engine, Pruning(0.5), Decoding(2, greedy=True)), terminal=False) for _ in range(2))
    for talk, text in ((first, "one"), (second, "two")):
        talk.session = "mine"
        say(talk, text)
    for talk in (first, second, first, second):
        _chat_commands.save(talk)
    assert (first.session, second.session) == ("mine", "mine-2")
    assert [questions(in_session(name)) for name in ("mine", "mine-2")] == [["one"], ["two"]]


@pytest.mark.parametrize("how", ["saved", "rescued"])
def test_a_session_that_was_resumed_twice_keeps_both(how: str, folder: Path, talk: Talk, capsys: Any) -> None:
    _chat_commands.save(talk, "mine")
    found = open_session("mine")
    other = Talk(resume("mine", Engine(folder)), terminal=False)
    other.session, other.seen = "mine", found.identity
    say(other, "three")
    say(talk, "two")
    _chat_commands.save(talk)
    _chat_commands.save(other) if how == "saved" else _chat_commands.rescue(other)
    assert questions(in_session("mine")) == ["one", "two"]
    assert questions(in_session("mine-2")) == ["one", "three"]
    assert "--resume mine-2" in capsys.readouterr().err


def test_a_session_that_was_deleted_meanwhile_is_saved_again(talk: Talk) -> None:
    _chat_commands.save(talk, "mine")
    session_path("mine").unlink()
    assert _chat_commands.save(talk) == "mine"
