"""What an answer's text is made of, however it is cut into pieces."""

import random

import pytest
from tiny import tiny_tokenizer

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from griffin_offload.serving.reply import THINKING, Reply, thinks_already
from griffin_offload.serving.tools import HERMES, HERMES_XML, LLAMA, MISTRAL, MISTRAL_NAMED, Call, CallForm
from griffin_offload.text_stream import Streamer, UntilStop

PARIS = Call("weather", '{"city": "Paris"}')
ROME = Call("weather", '{"city": "Rome"}')


def read(reply: Reply, pieces: list[str]) -> tuple[str, str, list[Call]]:
    """The reply, the thinking and the calls of an answer that comes in pieces."""
    told = [part for piece in pieces for part in reply.feed(piece)] + reply.end()
    text = "".join(part.text for part in told if not part.thinking)
    return text, "".join(part.text for part in told if part.thinking), [part.call for part in told if part.call]


def cuts(text: str) -> list[list[str]]:
    """A text whole, by letters, and cut at random."""
    several = [[text], list(text)]
    for seed in range(20):
        draw = random.Random(seed)
        places = sorted(draw.sample(range(len(text) + 1), min(4, len(text))))
        several.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return several


@pytest.mark.parametrize(
    ("form", "closes", "text", "expected"),
    [
        (None, "", "Hello\n world \n", ("Hello\n world \n", "", [])),
        (None, "", "<think>\nWhy?\n</think>\n\nSo.", ("So.", "Why?", [])),
        (None, "", "\n<think>Why?</think>So.", ("So.", "Why?", [])),
        (None, "</think>", "Why?\n</think>\n\nSo.", ("So.", "Why?", [])),
        (None, "</think>", "Why? No end", ("", "Why? No end", [])),
        (None, "", "Write <think> and </think>.", ("Write <think> and </think>.", "", [])),
        (None, "", "a < b <thin", ("a < b <thin", "", [])),
        (None, "", "<|channel>thought\nHm.<channel|>So.", ("So.", "Hm.", [])),
        (None, "", "<think>a</think><think>b</think>c", ("c", "ab", [])),
        (None, "", "<tool_call>{}</tool_call>", ("<tool_call>{}</tool_call>", "", [])),
        (HERMES, "", 'Let me.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
         ("Let me.", "", [PARIS])),
        (HERMES, "", '<think>Hm</think><tool_call>{"name":"weather","arguments":{"city":"Paris"}}</tool_call>\n'
         '<tool_call>{"name":"weather","arguments":"{\\"city\\":\\"Rome\\"}"}</tool_call>\n',
         ("", "Hm", [PARIS, ROME])),
        (HERMES, "", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}', ("", "", [PARIS])),
        (HERMES, "", "<tool_call>Paris</tool_call> Sorry.", ("<tool_call>Paris</tool_call> Sorry.", "", [])),
        (HERMES, "", '{"name": "weather", "arguments": {"city": "Paris"}}\n', ("", "", [PARIS])),
        (HERMES, "", '[{"name": "weather", "arguments": {"city": "Paris"}}]', ("", "", [PARIS])),
        (HERMES, "", '{"name": "weather"} is it', ('{"name": "weather"} is it', "", [])),
        (HERMES, "", "[1] is it", ("[1] is it", "", [])),
        (HERMES, "", '{"name": "other", "arguments": {}}', ('{"name": "other", "arguments": {}}', "", [])),
        (HERMES, "", '<tool_call>{"name": "other"}</tool_call>', ("", "", [Call("other", "{}")])),
        (HERMES_XML, "", "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
         "</tool_call>", ("", "", [PARIS])),
        (MISTRAL, "", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, '
         '{"name": "weather", "arguments": {"city": "Rome"}}]', ("", "", [PARIS, ROME])),
        (MISTRAL_NAMED, "", '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]weather{"city": "Rome"}',
         ("", "", [PARIS, ROME])),
        (LLAMA, "", '{"name": "weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
        (LLAMA, "", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}; '
         '{"name": "weather", "parameters": {"city": "Rome"}}', ("", "", [PARIS, ROME])),
        (LLAMA, "", '{"name": "other", "parameters": {}}', ('{"name": "other", "parameters": {}}', "", [])),
        (LLAMA, "", 'Say {"name": "weather", "parameters": {}}', ('Say {"name": "weather", "parameters": {}}', "", [])),
        (LLAMA, "", '{"a": 1', ('{"a": 1', "", [])),
    ],
)  # fmt: skip
def test_an_answer_is_read_the_same_however_it_is_cut(
    form: CallForm | None, closes: str, text: str, expected: tuple[str, str, list[Call]]
) -> None:
    for pieces in cuts(text):
        assert read(Reply(form, {"weather"}, closes), pieces) == expected, pieces


@pytest.mark.parametrize(
    ("special", "answer"),
    [
        (
            ["<|channel|>", "<|message|>"],
            "<|channel|>analysis<|message|>They want ü.<|end|><|start|>assistant<|channel|>final<|message|>Four ü.",
        ),
        (["<think>", "</think>"], "<think>\nThey want ü.\n</think>\n\nFour ü."),
        (["[THINK]", "[/THINK]"], "[THINK]They want ü.[/THINK]Four ü."),
        ([], "<think>They want ü.</think>Four ü."),
    ],
)
def test_thinking_as_the_engine_streams_it(special: list[str], answer: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    texts: list[str] = []
    streamer = Streamer(tokenizer, set(), lambda token: texts.append(token.text))
    for token in tokenizer(answer, add_special_tokens=False)["input_ids"]:
        streamer.put(token)
    streamer.end()
    assert read(Reply(), texts) == ("Four ü.", "They want ü.", [])


def test_text_is_passed_on_as_it_comes() -> None:
    """Nothing waits but what may be the beginning of a mark."""
    reply = Reply(HERMES, {"weather"})
    assert [part.text for part in reply.feed("Hello there <to")] == ["Hello there"]
    assert [part.text for part in reply.feed("ast> and")] == [" <toast> and"]


@pytest.mark.parametrize(("opens", "closes"), THINKING.items())
def test_thinking_that_the_prompt_has_begun(opens: str, closes: str) -> None:
    assert thinks_already(f"<|im_start|>assistant\n{opens}\n") == closes
    assert thinks_already(f"<|im_start|>assistant\n{opens}\n\n{closes}\n\n") == ""


@pytest.mark.parametrize(
    ("marks", "text", "expected", "done"),
    [
        (("END",), "one END two", "one ", True),
        (("END", "one E"), "one END two", "", True),
        (("\n\n", "User:"), "a\nb\n\nc", "a\nb", True),
        (("END",), "one EN", "one EN", False),
        ((), "one", "one", False),
        (("aab",), "aaab", "a", True),
    ],
)
def test_stop_strings(marks: tuple[str, ...], text: str, expected: str, done: bool) -> None:
    for pieces in cuts(text):
        stops = UntilStop(marks)
        assert ("".join(map(stops, pieces)) + stops.close(), stops.done) == (expected, done)
