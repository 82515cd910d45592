"""Answers whose special tokens part thinking from the reply: neither runs into the other, whole or streamed."""

from pathlib import Path

import pytest
from tiny import tiny_checkpoint, tiny_tokenizer

from griffin_offload import Engine, streamer
from griffin_offload.chat import Chat
from griffin_offload.text_stream import Streamer, Token

HARMONY = ["<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|constrain|>"]
FINAL = "<|start|>assistant<|channel|>final<|message|>"
THOUGHT = "<think>\nthey want a sum\n</think>\n\n"


def streamed(answer: str, special: list[str]) -> tuple[str, str, str]:
    """(text, reply, what was passed on) of an answer whose markers are special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    told: list[Token] = []
    streamer = Streamer(tokenizer, {tokenizer.convert_tokens_to_ids("<|return|>")}, told.append)
    for token in tokenizer(answer, add_special_tokens=False)["input_ids"]:
        streamer.put(token)
    streamer.end()
    quiet = Streamer(tokenizer, set())
    for token in streamer.token_ids:
        quiet.put(token)
    assert (quiet.text, quiet.reply) == (streamer.text, streamer.reply)
    return streamer.text, streamer.reply, "".join(token.text for token in told)


@pytest.mark.parametrize(
    ("answer", "text", "reply"),
    [
        (f"<|channel|>analysis<|message|>they want a sum<|end|>{FINAL}four<|return|>", f"{THOUGHT}four", "four"),
        (f"<|channel|>analysis<|message|>they want a sum<|end|>{FINAL}grüße 🎉", f"{THOUGHT}grüße 🎉", "grüße 🎉"),
        ("<|channel|>final<|message|>four<|return|>", "four", "four"),
        ("<|message|>four<|end|>", "four", "four"),
        ("<|channel|>analysis<|message|>they want", "<think>\nthey want", ""),
        (
            '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>',
            '<think>\n{"a": 1}\n</think>\n\n',
            "",
        ),
        ("plain text", "plain text", "plain text"),
    ],
)
def test_channels_of_gpt_oss(answer: str, text: str, reply: str) -> None:
    assert streamed(answer, HARMONY) == (text, reply, text)


@pytest.mark.parametrize(
    ("opens", "closes"),
    [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>", "<channel|>"), ("<tool_call>", "</tool_call>")],
)
def test_markers_that_are_special_tokens_stay(opens: str, closes: str) -> None:
    answer = f"{opens}they want ü{closes}four"
    assert streamed(answer + "<|end|>", [opens, closes]) == (answer, answer, answer)


def test_an_unfinished_character_before_a_marker() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    first = tokenizer("ü", add_special_tokens=False)["input_ids"][0]
    told: list[Token] = []
    streamer = Streamer(tokenizer, set(), told.append)
    after = tokenizer("</think>a", add_special_tokens=False)["input_ids"]
    for token in (first, *after):
        streamer.put(token)
    streamer.end()
    assert streamer.text == "".join(token.text for token in told) == "\ufffd</think>a"


def test_the_next_turn_is_told_the_reply_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(Engine(tiny_checkpoint(tmp_path / "m", "llama", chat=True), device_memory="8GiB"))
    monkeypatch.setattr(Streamer, "reply", "four")
    answer = chat.ask("what is 2+2")
    assert answer.reply == "four" != answer.text
    assert chat.conversation.messages[-1] == {"role": "assistant", "content": "four"}


def test_the_public_streamer_hears_text_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": HARMONY})
    told: list[str] = []
    ours = streamer.Streamer(tokenizer, {tokenizer.convert_tokens_to_ids("<|return|>")}, told.append)
    for token in tokenizer(f"<|channel|>analysis<|message|>they want a sum<|end|>{FINAL}grüße<|return|>")["input_ids"]:
        ours.put(token)
    ours.end()
    assert "".join(told) == ours.text == f"{THOUGHT}grüße"
    assert all(told)
    assert ours.reply == "grüße"
