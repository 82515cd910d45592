"""Sessions: a chat that is saved and resumed goes on as one that was never interrupted, and reads the weights once."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying
from tiny import CHAT_TEMPLATE, tiny_checkpoint

from griffin_offload import Engine, GriffinError
from griffin_offload.chat import Chat
from griffin_offload.checkpoint.one_file import read_facts, reading, write_file
from griffin_offload.errors import OptionError
from griffin_offload.options import Decoding, Pruning
from griffin_offload.run import Answer
from griffin_offload.session import delete_session, open_session, save_session, session_names, session_path

GREEDY = Decoding(max_new_tokens=12, greedy=True)
HALF = Pruning(sparsity=0.5, method="griffin")
SETTINGS = [
    HALF,
    Pruning(sparsity=0.0),
    Pruning(sparsity=0.5, rest="int4"),
    Pruning(sparsity=0.0, resident_dtype="int8"),
]


# A type for each kind of cache: plain, with sliding windows, latent, shared between layers, indexed, and with states.
KINDS = """llama gpt2 deepseek_v3 gemma3_text gemma4_text mistral qwen2_moe deepseek_v32
    jamba qwen3_next falcon_h1 nemotron_h lfm3""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_STATE", str(tmp_path / "state"))


def opened(folder: Path, make: Callable[[Path], Engine] = Engine) -> Engine:
    engine = make(folder)
    engine.tokenizer.chat_template = CHAT_TEMPLATE
    return engine


def same_as_uninterrupted(
    folder: Path, pruning: Pruning, make: Callable[[Path], Engine] = Engine, decoding: Decoding = GREEDY
) -> tuple[Answer, Answer]:
    """Three turns, with a new engine between the second and the third. The third's answers: uninterrupted, resumed."""
    talk = Chat(opened(folder, make), pruning, decoding, "Be brief.")
    talk.ask("one thing that is long enough to be told of at some length")
    talk.ask("two")
    save_session(talk, "talk")
    session = open_session("talk")
    expected = talk.ask("three")
    engine = opened(folder, make)
    again = session.resume(engine, session.options(Pruning), session.options(Decoding))
    assert again.pruning == pruning
    assert again.decoding == decoding
    assert again.conversation.messages == talk.conversation.messages[:-2]
    answer = again.ask("three")
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.report.turn == expected.report.turn
    for mine, own in zip(engine.resident.layers, talk.engine.resident.layers, strict=True):
        assert [each.tolist() for each in mine.kept_neurons] == [each.tolist() for each in own.kept_neurons]
    assert again.ask("four").token_ids == talk.ask("four").token_ids
    return expected, answer


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_goes_on_as_if_it_were_never_interrupted(case: Callable[[str], Case], kind: str) -> None:
    expected, answer = same_as_uninterrupted(case(kind).folder, HALF)
    turn = expected.report.turn
    assert turn
    assert (turn.kept_tokens > 40) == (not turn.why_not) == (kind != "deepseek_v32")
    assert answer.report.bytes_read < 1.05 * answer.report.checkpoint_bytes, "the weights are read once"


@pytest.mark.parametrize("make", [Engine, copying])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("pruning", SETTINGS)
def test_sessions_in_every_format(
    case: Callable[[str], Case], kind: str, pruning: Pruning, make: Callable[[Path], Engine]
) -> None:
    _, answer = same_as_uninterrupted(case(kind).folder, pruning, make)
    assert answer.report.turn
    assert answer.report.turn.kept_tokens > 40


def test_an_answer_longer_than_the_window_and_drafts(case: Callable[[str], Case]) -> None:
    for decoding in (replace(GREEDY, max_new_tokens=20), replace(GREEDY, lossless=True)):
        same_as_uninterrupted(case("mistral").folder, HALF, decoding=decoding)


@pytest.fixture
def llama(case: Callable[[str], Case]) -> Path:
    return case("llama").folder


@pytest.fixture
def talk(llama: Path) -> Chat:
    made = Chat(opened(llama), HALF, GREEDY)
    made.ask("one")
    return made


def test_a_session_is_for_its_owner_alone_and_replaced_whole(talk: Chat) -> None:
    session = save_session(talk, "a.b-c")
    assert stat.S_IMODE(os.stat(session.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(session.path.parent).st_mode) == 0o700
    assert (session.messages, session.tokens > 10, session.bytes > 1000) == (2, True, True)
    talk.ask("two")
    assert save_session(talk, "a.b-c").messages == open_session("a.b-c").messages == 4
    assert os.listdir(session.path.parent) == ["a.b-c.safetensors"]


def test_the_newest_the_list_and_what_is_deleted(talk: Chat) -> None:
    with pytest.raises(GriffinError, match="no session is saved"):
        open_session(None)
    for number, name in enumerate(("one", "two")):
        os.utime(save_session(talk, name).path, (number, number))
    assert session_names() == ["two", "one"]
    assert open_session(None).name == "two"
    delete_session("two")
    assert session_names() == ["one"]
    for wrong in (lambda: open_session("two"), lambda: delete_session("two")):
        with pytest.raises(GriffinError, match="there is no session two"):
            wrong()
    for name in ("../x", "", ".x", "a/b", "-x", "x" * 200):
        with pytest.raises(OptionError, match="names no session"):
            session_path(name)


def test_nothing_said_is_nothing_to_save(llama: Path) -> None:
    with pytest.raises(GriffinError, match="nothing to save yet"):
        save_session(Chat(opened(llama)), "x")


def resume(folder: Path, name: str = "x") -> Chat:
    session = open_session(name)
    return session.resume(opened(folder), session.options(Pruning), session.options(Decoding))


def test_the_session_of_another_model_is_refused_in_one_line(talk: Chat, tmp_path: Path) -> None:
    save_session(talk, "x")
    other = tiny_checkpoint(tmp_path / "other", "llama", seed=9, chat=True)
    with pytest.raises(GriffinError, match=r"the session x is of .*another model, or another version") as caught:
        resume(other)
    assert "\n" not in str(caught.value)


def test_another_dtype_and_another_version_are_refused(talk: Chat, llama: Path) -> None:
    session = save_session(talk, "x")
    with pytest.raises(GriffinError, match="the session x ran in float32: give --dtype float32"):
        open_session("x").resume(opened(llama, lambda path: Engine(path, dtype="bfloat16")), HALF, GREEDY)
    facts = read_facts(session.path)
    write_file(session.path, {}, {**facts, "version": 2})
    with pytest.raises(GriffinError, match=r"saved by another version of Griffin \(format 2; this one reads 1\)"):
        open_session("x")
    write_file(session.path, {}, {"format": "else"})
    with pytest.raises(GriffinError, match="another version"):
        open_session("x")


def why_refused(folder: Path) -> str:
    try:
        resume(folder)
    except GriffinError as error:
        return str(error)
    return ""


def test_a_damaged_file_is_refused_wherever_it_is_damaged(talk: Chat, llama: Path) -> None:
    session = save_session(talk, "x")
    whole = session.path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = [
        0,
        7,
        20,
        8 + header // 2,
        *range(8 + header, len(whole), max(1, (len(whole) - header) // 24)),
        len(whole) - 1,
    ]
    for place in places:
        session.path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        refused = why_refused(llama)
        assert refused or place < 8 + header, "a changed tensor is found out"  # a letter of a message may differ
        assert "\n" not in refused
    for size in (0, 5, 8 + header, len(whole) - 1):
        session.path.write_bytes(whole[:size])
        with pytest.raises(GriffinError, match="damaged"):
            resume(llama)
    session.path.write_bytes(whole)
    assert resume(llama).conversation.messages == talk.conversation.messages


@pytest.mark.parametrize(
    "change",
    [
        {"conversation": {"messages": 3}},
        {"turns": {}},
        {"turns": {"room": "x"}},
        {"tensors": 5},
        {"pruning": {"sparsity": 7}},
        {"tokens": "many"},
    ],
)
def test_facts_that_are_not_what_was_saved_are_refused(talk: Chat, llama: Path, change: dict[str, Any]) -> None:
    session = save_session(talk, "x")
    with reading(session.path) as read:
        tensors = {name: read(name).clone() for name in session.facts["tensors"]}
    write_file(session.path, tensors, {**session.facts, **change})
    with pytest.raises(GriffinError) as caught:
        resume(llama)
    assert "\n" not in str(caught.value)


def test_a_conversation_whose_cache_is_gone_is_saved_without_it(talk: Chat, llama: Path) -> None:
    talk.engine.unload()
    session = save_session(talk, "x")
    assert session.tokens == 0
    again = resume(llama)
    answer = again.ask("two")
    assert answer.report.turn
    assert answer.report.turn.kept_tokens == 0
    assert answer.token_ids == talk.ask("two").token_ids


def test_undo_after_resuming_and_other_options(talk: Chat, llama: Path) -> None:
    talk.ask("two")
    save_session(talk, "x")
    session = open_session("x")
    again = session.resume(opened(llama), session.options(Pruning, sparsity=0.75), session.options(Decoding))
    assert again.pruning.sparsity == 0.75
    assert again.conversation.undo() == talk.conversation.undo() == "two"
    talk.set("sparsity", "0.75")
    assert again.ask("three").token_ids == talk.ask("three").token_ids


def test_one_file_holds_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(7),
        "d": torch.randn(5, 5)[:, ::2],
    }
    write_file(tmp_path / "f", tensors, {"x": ["ä", 1]})
    assert read_facts(tmp_path / "f") == {"x": ["ä", 1]}
    with reading(tmp_path / "f") as read:
        for name, tensor in tensors.items():
            assert torch.equal(read(name), tensor)
            assert read(name).dtype == tensor.dtype
    assert json.loads(json.dumps(read_facts(tmp_path / "f")))
