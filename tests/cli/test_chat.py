"""`griffin chat`, its turns through a pipe."""

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from command_line import ANSWER, Run, failed


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
    costs = re.findall(r"(\d+) of (\d+) prompt tokens computed, [\d.]+ \w+ read", result.stderr)
    assert [whole == computed for computed, whole in costs] == [True, False]


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
    result = chat(run, model, "/set", "/set sparsity 2", "/set heat 1", "/set top", "/set temperature 1", "/mem", "one")
    assert re.search(r"^max_new_tokens: 8$", result.stderr, re.MULTILINE)
    assert result.stderr.count("error: ") == 4
    assert "nothing is resident" in result.stderr
    assert result.stdout == plain, "a refused setting changes nothing"


def test_chat_help_exit_and_unknown_commands(run: Run, model: Path) -> None:
    result = chat(run, model, "/help", "/dance", "/exit", "one")
    assert result.stdout == ""
    names = "/help /clear /undo /retry /edit /read /system /set /think /mem /save /load /export /session /exit"
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


def test_chat_tells_how_much_of_the_model_is_kept_and_what_to_set(run: Run, model: Path) -> None:
    result = chat(run, model, "one", "/set no_fidelity on", "two", options=("--sparsity", "1", "--rest", "drop"))
    footers = re.findall(r"^8 tokens · .* · keeps 0\.\d\d of the full model's choices", result.stderr, re.MULTILINE)
    assert len(footers) == 1
    helps = "the answer may be far from the full model's; it fits with /set {}rest int4, or with /set sparsity 0"
    assert helps.format("") in result.stderr
    result = chat(run, model, "one", options=("--sparsity", "1", "--method", "griffin"))
    assert helps.format("method none and /set ") in result.stderr


def test_a_session_is_saved_when_the_chat_ends_and_resumed(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_STATE", str(tmp_path))
    half = ("--sparsity", "0.5", "--rest", "drop")
    whole = chat(run, model, "one", "two", "three", options=half).stdout
    first = chat(run, model, "one", "/set max_new_tokens 8", options=(*half, "--session", "talk"))
    assert re.search(r"saved the session: 2 messages, \d+ tokens, .* griffin chat --resume talk", first.stderr)
    assert len(json.loads(run("sessions", "--json").stdout)) == 1
    taken = run("chat", "--model", model, "--session", "talk", stdin="one")
    failed(taken, 1, "the session talk exists: --resume talk goes on with it")
    second = run("chat", "--resume", stdin="two\n/session\n")  # with the model and the options of before
    assert second.exit_code == 0, second.output
    assert re.search(r"talk: 2 messages, \d+ tokens that need not be computed", second.stderr)
    assert "session: talk, saved when the chat ends" in second.stderr
    third = run("chat", "--resume", "talk", "--temperature", "0", stdin="three\n/session other\n/session none\n")
    assert first.stdout + second.stdout + third.stdout == whole
    table = run("sessions").stdout
    assert re.search(r"^ other .* 6 ", table, re.MULTILINE)
    assert re.search(r"^ talk .* 4 ", table, re.MULTILINE)
    failed(run("chat", "--resume", "gone", stdin="x"), 1, "there is no session gone; there are: other, talk")
    failed(run("chat", "--resume", "talk", "--session", "x", stdin="x"), 2, "leave out --session")
    (tmp_path / "sessions" / "talk.safetensors").write_bytes(b"x" * 100)
    failed(run("chat", "--resume", "talk", stdin="x"), 1, "the session talk cannot be read")
    assert "cannot be read" in run("sessions").stdout
    assert run("sessions", "--delete", "talk", "--delete", "other").exit_code == 0
    assert "no session is saved" in run("sessions").stderr
    nothing = chat(run, model, "/session x", options=("--session", "talk"))
    assert "nothing was said" in nothing.stderr
    assert not list((tmp_path / "sessions").iterdir())


def test_the_end_of_the_context_is_told(run: Run, model: Path) -> None:
    lines = ("one " * 28, "two " * 60, "/set max_new_tokens 200", "/undo", "three")
    told = chat(run, model, *lines, options=("--context", "120")).stderr
    offers = "/undo takes back the last turn, /clear forgets the conversation"
    assert re.search(rf"^\d+ of 120 tokens of context are used, \d+ are left: {offers}", told, re.MULTILINE)
    refused = rf"^error: the prompt has 3\d\d tokens; .* reads at most 120 \(--context\), answer included: {offers}"
    assert re.search(f"{refused}; the message is taken back$", told, re.MULTILINE)
    assert "taken back: one one" in told
    assert re.search(r"\d+ tokens · .* · the context of 120 tokens is full$", told, re.MULTILINE)
