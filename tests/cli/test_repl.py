"""`griffin chat` at a terminal: every command, pastes, history, Ctrl-C in every phase, small and dumb terminals."""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import ANSWER
from griffin_offload.cli._chat_commands import COMMANDS
from screen import ALT_ENTER, CTRL_C, CTRL_D, CTRL_R, CTRL_U, TAB, UP, Screen, pasted

LEAVE = "Ctrl-D or /exit leaves; /help lists the commands"
DONE = "8 tokens ·"


@pytest.fixture
def start() -> Iterator[Callable[..., Screen]]:
    started: list[Screen] = []

    def begin(*arguments: object, **options: object) -> Screen:
        started.append(Screen(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for one in started:
        one.close()


def saved(talk: Screen, file: Path) -> list[str]:
    """What was said in a chat."""
    talk.say(f"/save {file}", "messages in")
    return [turn["content"] for turn in json.loads(file.read_text())["messages"]]


def test_every_command(start: Callable[..., Screen], model: Path, tmp_path: Path) -> None:
    (tmp_path / "a text.txt").write_text("The word is BANANA.\n")
    editor = tmp_path / "editor.py"
    editor.write_text("import sys; open(sys.argv[1], 'a').write(' and this')\n")
    talk = start("chat", "--model", model, *ANSWER, EDITOR=f"python3 {editor}")
    talk.wait_for(LEAVE)
    talk.wait_for("llama · 0 of 256 tokens · budget")
    talk.wait_for_prompt()
    talk.say("one", DONE)
    assert "the whole model fits" in talk.text
    assert "tokens/s" in talk.lines[-1]
    assert "100% of the neurons kept" in talk.lines[-1]
    talk.say("/help", "Ctrl-R searches what was typed")
    for name in COMMANDS:
        assert f"{name} " in talk.text
    talk.say("/Help undo", "/undo take back")
    talk.say("/RETRY", DONE)
    assert len(saved(talk, tmp_path / "talk.json")) == 2
    talk.say("/undo", "taken back: one")
    talk.say("/undo", "there is nothing to take back")
    talk.say(f"/read {tmp_path}/a text.txt", "read 19 characters")
    talk.say("what is it?", DONE)
    talk.say(f"/read '{tmp_path}/a text.txt' repeat it", DONE)
    assert saved(talk, tmp_path / "talk.json")[::2] == [
        "The word is BANANA.\n\nwhat is it?",
        "The word is BANANA.\n\nrepeat it",
    ]
    talk.say("/read nothing.txt", "cannot read the prompt file nothing.txt")
    talk.say("/clear", "forgot the conversation")
    talk.say("/edit first", "asked: first and this")
    assert saved(talk, tmp_path / "talk.json")[::2] == ["first\n and this"]
    talk.say("/system Be brief.", "system: Be brief.")
    talk.say("/set max_new 3", "max_new_tokens: 3")
    talk.say("/set stop ###", "stop: ###")
    talk.say("/set temp", "temperature: default")
    talk.say("/set top", "top may be")
    talk.say("/set", "ffn_skip_run: 0")
    talk.say("/think off", "thinking is folded to a line")
    talk.say("/think maybe", "/think is on or off")
    talk.say("/mem", "peak memory")
    talk.say(f"/export {tmp_path / 'talk.md'}", "wrote 2 messages to")
    assert "## User\n\nfirst\n and this\n\n## Assistant\n" in (tmp_path / "talk.md").read_text()
    talk.say(f"/export {tmp_path / 'talk.md'}", "exists: choose another name")
    talk.say("/clear", "forgot the conversation")
    talk.say(f"/load {tmp_path / 'talk.json'}", "loaded 2 messages")
    talk.say("/retri", "did you mean /retry?")
    talk.type("/bye\r")
    assert talk.exit_code() == 0


def test_pastes_lines_and_what_is_typed_ahead(start: Callable[..., Screen], slow: Path, tmp_path: Path) -> None:
    talk = start("chat", "--model", slow, "--max-new-tokens", "20", "--greedy", "--sparsity", "0.5")
    talk.wait_for_prompt()
    talk.type(pasted("Fix this:\r\n\r\ndef add(a, b):\r\n    return a - b \\\r\n"))
    talk.settle()
    talk.say(" please", "20 tokens ·")
    talk.type('"""/one\rtwo\\\r"""')
    talk.say("", "20 tokens ·")
    talk.type(f"three{ALT_ENTER}four\\\r")
    talk.say("five", "20 tokens ·")
    talk.type(pasted("/undo"))
    talk.say("", "taken back: three four five")
    talk.type("six\r")
    talk.read_for(0.3)
    talk.type("seven")
    talk.type(pasted("eight\n\nnine"))
    talk.wait_for("20 tokens ·", 4)
    talk.settle()
    talk.say("", "20 tokens ·")
    asked = saved(talk, tmp_path / "talk.json")[::2]
    assert asked == [
        "Fix this:\n\ndef add(a, b):\n    return a - b \\ please",
        "/one\ntwo\\",
        "six",
        "seveneight\n\nnine",
    ]
    answers = saved(talk, tmp_path / "talk.json")[1::2]
    assert not any("seven" in answer for answer in answers)
    assert talk.text.count("seveneight") == 1, "what is typed ahead is shown once, at its prompt"
    talk.type("/quit\r")
    assert talk.exit_code() == 0


def test_history_search_and_completion(start: Callable[..., Screen], model: Path, tmp_path: Path) -> None:
    command = ("chat", "--model", model, *ANSWER)
    talk = start(*command, GRIFFIN_STATE=str(tmp_path))
    talk.wait_for_prompt()
    talk.say("a question to find again", DONE)
    talk.type("/und" + TAB)
    talk.wait_for("> /undo")
    talk.say("", "taken back")
    talk.type("/set max" + TAB + "2")
    talk.say("", "max_new_tokens: 2")
    talk.type(f"/load {tmp_path}/his" + TAB)
    talk.wait_for(f"/load {tmp_path}/history")
    talk.say("", "cannot load a conversation")
    talk.type("not this" + CTRL_C)
    talk.wait_for(LEAVE, 2)
    talk.wait_for_prompt()
    talk.type(CTRL_D)
    assert talk.exit_code() == 0
    history = tmp_path / "history"
    assert stat.S_IMODE(os.stat(history).st_mode) == 0o600
    again = start(*command, GRIFFIN_STATE=str(tmp_path))
    again.wait_for_prompt()
    again.type(UP)
    again.wait_for(f"> /load {tmp_path}/history")
    again.type(CTRL_U + CTRL_R + "find")
    again.wait_for("a question to find again")
    again.type("\r")  # found
    again.settle()
    again.say("", DONE)
    again.type("/exit\r")
    assert again.exit_code() == 0


def test_ctrl_c_in_every_phase(start: Callable[..., Screen], slow: Path, tmp_path: Path) -> None:
    talk = start("chat", "--model", slow, "--max-new-tokens", "9000", "--greedy", "--sparsity", "0.5")
    talk.wait_for_prompt()
    talk.type("half a question" + CTRL_C)
    talk.wait_for(LEAVE, 2)
    talk.wait_for_prompt()
    (tmp_path / "long.txt").write_text("The sky is blue. " * 900)
    talk.type(f"/read {tmp_path}/long.txt why?\r")
    talk.wait_for("/48")
    talk.type(CTRL_C)
    talk.wait_for("stopped before the first token: the question is taken back")
    talk.wait_for_prompt()
    talk.say("/undo", "there is nothing to take back")
    talk.say("/clear", "forgot")
    talk.type("Hello\r")
    talk.read_for(1.5)
    talk.type(CTRL_C)
    talk.wait_for("· stopped")
    talk.wait_for_prompt()
    question, answer = saved(talk, tmp_path / "talk.json")
    assert question == "Hello"
    assert answer, "the part that was made is kept"
    talk.type(CTRL_D)
    assert talk.exit_code() == 0
    early = start("chat", "--model", slow)
    early.read_for(0.5)
    early.type(CTRL_C)
    assert early.exit_code() != 0
    assert "Traceback" not in early.text


def test_40_columns_without_colours_and_another_size(start: Callable[..., Screen], model: Path) -> None:
    talk = start("chat", "--model", model, *ANSWER, columns=40, rows=12, NO_COLOR="1")
    talk.wait_for_prompt()
    talk.say("one", DONE)
    talk.say("/help", "Ctrl-D leaves")
    talk.say("/dance", "no command /dance")
    assert all(len(line) <= 40 for line in talk.lines)
    broken = [line for line in talk.lines if line.startswith(("need", "de,", "trl-D"))]
    assert not broken, "words are whole"
    talk.type("a line that is longer than forty columns are wide")
    talk.settle()
    talk.resize(90, 30)
    talk.settle()
    talk.say("", DONE)
    codes = {code for codes in re.findall(rb"\x1b\[([\d;]*)m", talk.raw) for code in codes.split(b";")}
    assert codes <= {b"", b"0", b"1", b"2", b"3", b"4", b"22"}, "no colours"
    talk.type(CTRL_D)
    assert talk.exit_code() == 0


def test_a_dumb_terminal_gets_lines(start: Callable[..., Screen], model: Path) -> None:
    talk = start("chat", "--model", model, *ANSWER, TERM="dumb")
    talk.wait_for(LEAVE)
    talk.type("one\r")
    talk.wait_for(DONE)
    talk.type('"""\rtwo\r"""\r')
    talk.wait_for(DONE, 2)
    talk.type("/quit\r")
    assert talk.exit_code() == 0
    assert b"\x1b" not in talk.raw.replace(b"\x1b[?2004h", b"").replace(b"\x1b[?2004l", b"")
