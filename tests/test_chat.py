"""Conversations, settings, transcripts, and turns on a tiny model: the library side of `griffin chat`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint

from griffin_offload import Engine, GriffinError
from griffin_offload.chat import STOP, Chat, Conversation, transcript
from griffin_offload.errors import OptionError, PromptError
from griffin_offload.options import Decoding, FfnSkip, Pruning, as_dict, build

ROOT = os.name == "posix" and os.geteuid() == 0


def conversation(*turns: str, system: str | None = None) -> Conversation:
    result = Conversation(system)
    for index, text in enumerate(turns):
        (result.add_assistant if index % 2 else result.add_user)(text)
    return result


# Conversation


def test_messages_begin_with_the_system_text_and_are_a_copy() -> None:
    talk = conversation("one", "1", "two", system="Be brief.")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in talk.messages] == ["Be brief.", "one", "1", "two"]
    talk.messages[1]["content"] = "changed"
    assert talk.messages[1]["content"] == "one"


@pytest.mark.parametrize("system", [None, ""])
def test_no_system_text_is_no_system_message(system: str | None) -> None:
    assert conversation("one", system=system).messages == [{"role": "user", "content": "one"}]


def test_undo_takes_back_one_exchange_at_a_time() -> None:
    talk = conversation("one", "1", "two", "2", system="S")
    assert talk.last_user == "two"
    assert talk.undo() == "two"
    assert [m["content"] for m in talk.messages] == ["S", "one", "1"]
    assert talk.undo() == "one"
    assert talk.undo() is None
    assert talk.last_user is None
    assert talk.messages == [{"role": "system", "content": "S"}]


def test_undo_of_an_unanswered_question_leaves_the_exchange_before_it() -> None:
    talk = conversation("one", "1", "two")
    assert talk.undo() == "two"
    assert [m["content"] for m in talk.messages] == ["one", "1"]


def test_clear_keeps_the_system_text() -> None:
    talk = conversation("one", "1", system="S")
    talk.clear()
    assert len(talk) == 0
    assert talk.messages == [{"role": "system", "content": "S"}]


def test_drop_answer_needs_an_answer() -> None:
    assert conversation("one").drop_answer() is None
    talk = conversation("one", "1")
    assert talk.drop_answer() == "1"
    assert talk.last_user == "one"


def test_a_saved_conversation_is_loaded_as_it_was(tmp_path: Path) -> None:
    talk = conversation("Grüße, 世界 \n\t\"'\\", "", "two", "2\u2028", system="Sÿstem")
    talk.save(tmp_path / "talk.json")
    again = Conversation.load(tmp_path / "talk.json")
    assert again.messages == talk.messages
    assert again.system == talk.system
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"], "no temporary file is left"


def test_saving_replaces_a_conversation_but_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    conversation("one", "1").save(path)
    conversation("two", "2").save(path)
    assert Conversation.load(path).last_user == "two"
    path.write_text("my novel")
    with pytest.raises(GriffinError, match="exists and is not a saved conversation"):
        conversation("one", "1").save(path)
    assert path.read_text() == "my novel"


def test_saving_into_no_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match=r"cannot save .*nowhere/talk\.json: no such file or directory"):
        conversation("one", "1").save(tmp_path / "nowhere" / "talk.json")


@pytest.mark.skipif(ROOT, reason="root may write anywhere")
def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(GriffinError, match="permission denied"):
            conversation("one", "1").save(tmp_path / "talk.json")
    finally:
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


GOOD: dict[str, Any] = {"format": "griffin-conversation", "version": 1, "system": None, "messages": []}
USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deep|not JSON"),
        ([], "no \"format\""),
        ({"messages": []}, "no \"format\""),
        (GOOD | {"version": 2}, "version 2; this Griffin reads version 1"),
        (GOOD | {"system": 5}, "system text"),
        (GOOD | {"messages": {}}, "no list of messages"),
        (GOOD | {"messages": [USER]}, "last question has no answer"),
        (GOOD | {"messages": [ASSISTANT, USER]}, "message 1 should have the role 'user'"),
        (GOOD | {"messages": [USER, USER]}, "message 2 should have the role 'assistant'"),
        (GOOD | {"messages": [USER, {"role": "assistant", "content": None}]}, "message 2"),
        (GOOD | {"messages": [USER, "1"]}, "message 2"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, content: Any, what: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(GriffinError, match=what) as caught:
        Conversation.load(path)
    assert str(path) in str(caught.value)


def test_the_smallest_good_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(GOOD | {"messages": [USER, ASSISTANT]}))
    assert Conversation.load(path).messages == [USER, ASSISTANT]


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match=r"none\.json: no such file"):
        Conversation.load(tmp_path / "none.json")
    with pytest.raises(GriffinError, match="is a directory"):
        Conversation.load(tmp_path)


# Settings


def pruning(**values: Any) -> Pruning:
    """From declared names, as the commands build it."""
    return build(Pruning, values)


def settings(chosen: Pruning | None = None, decoding: Decoding | None = None) -> Chat:
    """Settings need no engine."""
    engine: Any = None
    return Chat(engine, chosen, decoding)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparsity", 1.01),
        ("sparsity", -0.01),
        ("sparsity", float("nan")),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("ffn_skip", 1.5),
        ("ffn_skip_warmup", -1),
        ("ffn_skip_run", -1),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(name: str, value: float) -> None:
    group: Any = Pruning if name in as_dict(Pruning()) else Decoding
    with pytest.raises(OptionError, match=f"{name} .* outside its range"):
        build(group, {name: value})
    with pytest.raises(OptionError, match=f"{name} .* outside its range"):
        settings().set(name, str(value))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    pruning(sparsity=0.0)
    pruning(sparsity=1.0)
    Decoding(max_new_tokens=1, temperature=1e-3, top_p=1.0, top_k=0, seed=0)
    Decoding(seed=2**32 - 1)


def test_greedy_and_sampling_exclude_each_other() -> None:
    chat = settings(decoding=Decoding(greedy=True))
    for name, text in (("temperature", "1"), ("seed", "1")):
        with pytest.raises(OptionError, match=f"likeliest token every time: leave out {name}"):
            chat.set(name, text)
    assert chat.decoding == Decoding(greedy=True), "a refused setting changes nothing"


def test_a_seed_of_a_selection_asks_for_no_sampling() -> None:
    chat = settings(pruning(selection="random"), Decoding(greedy=True))
    chat.set("seed", "3")
    assert chat.decoding.generate_options(chat.pruning.selection) == {"do_sample": False}
    with pytest.raises(OptionError, match="leave out seed"):
        chat.set("selection", "topk")
    with pytest.raises(OptionError, match="selection 'best' is not known; known: topk"):
        chat.set("selection", "best")
    assert chat.pruning == Pruning(selection="random")
    with pytest.raises(OptionError, match="sparsity 2 is outside"):
        pruning(sparsity=(0.5, 2))


def test_skipping_from_text() -> None:
    chat = settings()
    chat.set("ffn_skip", "0.25")
    assert chat.pruning.skip == FfnSkip(0.25)
    chat.set("ffn_skip_mode", "prompt")
    chat.set("ffn_skip_cold", "1,3")
    assert chat.pruning.skip == FfnSkip(0.25, "prompt", (1, 3))
    for name, text in (("mode", "none"), ("warmup", "0"), ("run", "2")):
        chat.set(f"ffn_skip_{name}", text)
    assert chat.pruning.skip == FfnSkip(0.25, "token", (1, 3), 0, 2)
    chat.set("ffn_skip", "0")
    assert chat.pruning.skip.share == 0


def test_settings_from_text() -> None:
    chat = settings()
    for name, text in (("sparsity", "0.25"), ("top_k", "40"), ("max_new_tokens", "7")):
        chat.set(name, text)
    assert (chat.pruning, chat.decoding) == (Pruning(0.25), Decoding(top_k=40, max_new_tokens=7))
    for name, text in (("top_k", "none"), ("greedy", "ON"), ("max_new_tokens", "default")):
        chat.set(name, text)
    assert (chat.pruning, chat.decoding) == (Pruning(0.25), Decoding(greedy=True))
    assert chat.settings()["sparsity"] == 0.25
    assert chat.settings()["greedy"] is True


def test_a_setting_keeps_the_options_of_transformers() -> None:
    chat = settings(decoding=Decoding(more={"repetition_penalty": 1.2}))
    chat.set("top_k", "5")
    assert chat.decoding == Decoding(top_k=5, more={"repetition_penalty": 1.2})


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("sparsity", "half", "sparsity cannot be 'half': give a number"),
        ("top_k", "4.5", "a whole number"),
        ("greedy", "maybe", "on or off"),
        ("ffn_skip_cold", "2", "FIRST,LAST"),
        ("ffn_skip_mode", "layer", "known: token, prompt"),
        ("heat", "1", "no setting is called 'heat': there are sparsity, .*max_new_tokens"),
    ],
)
def test_a_setting_that_cannot_be_read_says_what_can(name: str, text: str, what: str) -> None:
    with pytest.raises(OptionError, match=what):
        settings().set(name, text)


# The transcript of base models


def test_transcript() -> None:
    assert transcript(conversation("one").messages) == "User: one\nAssistant:"
    talk = conversation("one", "1", "two", system="S.")
    assert transcript(talk.messages) == "S.\n\nUser: one\nAssistant: 1\nUser: two\nAssistant:"


# Turns, on a tiny model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_checkpoint(tmp_path_factory.mktemp("chat") / "llama", "llama", chat=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama"))


SHORT = Pruning(0.5), Decoding(max_new_tokens=8, greedy=True)


def test_a_turn_is_the_engines_answer_to_the_whole_conversation(engine: Engine) -> None:
    chat = Chat(engine, *SHORT, "Be brief.")
    first = chat.ask("one")
    second = chat.ask("two")
    talk = conversation("one", first.text, "two", system="Be brief.")
    expected = engine.generate(engine.encode_chat(talk.messages), *SHORT)
    assert second.token_ids == expected.token_ids
    assert second.prompt_token_ids == engine.encode_chat(talk.messages)
    assert chat.conversation.messages == [*talk.messages, {"role": "assistant", "content": second.text}]


def test_a_turn_that_fails_is_taken_back_and_the_next_one_works(engine: Engine) -> None:
    chat = Chat(engine, *SHORT)
    chat.ask("one")
    before = chat.conversation.messages
    with pytest.raises(PromptError):
        chat.ask("x" * 400)  # the context is 256 tokens
    assert chat.conversation.messages == before
    assert chat.ask("two").text
    assert len(chat.conversation) == 4


def test_a_turn_interrupted_before_its_first_token_is_taken_back(engine: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    chat = Chat(engine, *SHORT)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("one", on_layer=interrupt)
    assert chat.conversation.messages == []
    fresh = Chat(engine, *SHORT).ask("one")
    assert chat.ask("one").token_ids == fresh.token_ids


def test_an_answer_interrupted_later_is_kept_as_far_as_it_came(engine: Engine) -> None:
    heard: list[str] = []

    def interrupt(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    chat = Chat(engine, Pruning(0.5), Decoding(max_new_tokens=64, greedy=True))
    partial = chat.ask("one", on_text=interrupt)
    assert partial.finish_reason == "interrupted"
    assert 0 < len(partial.token_ids) < 64
    assert chat.conversation.messages[-1] == {"role": "assistant", "content": partial.text}
    assert chat.ask("two").text


def test_regenerate_answers_the_last_question_again(engine: Engine) -> None:
    chat = Chat(engine, *SHORT)
    first = chat.ask("one")
    assert chat.regenerate().token_ids == first.token_ids
    chat.decoding = Decoding(max_new_tokens=4, greedy=True)
    assert chat.regenerate().token_ids == first.token_ids[:4]
    assert len(chat.conversation) == 2


def test_regenerate_that_fails_keeps_the_old_answer(engine: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    chat = Chat(engine, *SHORT)
    with pytest.raises(GriffinError, match="no answer yet"):
        chat.regenerate()
    chat.ask("one")
    before = chat.conversation.messages
    chat.set("sparsity", "0.75")  # so that there is a pass
    with pytest.raises(KeyboardInterrupt):
        chat.regenerate(on_layer=interrupt)
    assert chat.conversation.messages == before


def test_a_base_model_continues_a_transcript(base: Engine) -> None:
    chat, heard = Chat(base, *SHORT, "S."), []
    generation = chat.ask("one", on_text=heard.append)
    assert generation.prompt_token_ids == base.encode("S.\n\nUser: one\nAssistant:", raw=True)
    answer = chat.conversation.messages[-1]["content"]
    assert answer == generation.text.split(STOP)[0].strip()
    assert "".join(heard).rstrip() == answer
