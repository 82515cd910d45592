"""What the JSON of a request asks for, and what is refused in it."""

from dataclasses import replace
from typing import Any

import pytest
from servers import WEATHER

from griffin_offload import Engine
from griffin_offload.options import Decoding, Pruning
from griffin_offload.serving.api_error import ApiError, api_error
from griffin_offload.serving.asked import OURS, Request, read_chat, read_completion
from griffin_offload.serving.fields import parse_body
from griffin_offload.serving.served import Limits, Served

HELLO = [{"role": "user", "content": "Hello"}]


def chat(served: Served, **body: Any) -> Request:
    return read_chat({"messages": HELLO, **body}, served)


def refused(served: Served, *words: str, **body: Any) -> ApiError:
    """The error that a chat gives, of status 400, with these words."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  what it becomes is checked
        chat(served, **body)
    error = api_error(caught.value)
    assert error.status == 400, error
    for word in words:
        assert word in error.message
    return error


def test_a_chat_is_encoded_as_the_engine_does(served: Served, engine: Engine) -> None:
    (ask,) = chat(served).asks
    assert ask.prompt_ids == engine.encode("Hello")
    assert ask.decoding == served.decoding
    assert ask.pruning == served.pruning
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert chat(served, messages=parts).asks[0].prompt_ids == ask.prompt_ids
    developer = chat(served, messages=[{"role": "developer", "content": "Be kind"}, *HELLO])
    assert developer.asks[0].prompt_ids == engine.encode("Hello", system="Be kind")


def test_calls_come_back_to_the_template_as_what_they_mean(served: Served, engine: Engine) -> None:
    called = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "abc", "content": "sunny"},
    ]
    (ask,) = chat(served, messages=messages, tools=[WEATHER]).asks
    text = engine.tokenizer.decode(ask.prompt_ids)
    assert "sunny" in text
    assert '"name": "weather"' in text


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {"greedy": True}),
        ({"temperature": 0.5}, {"greedy": False, "temperature": 0.5}),
        ({"temperature": 0, "seed": 3, "top_p": 0.5}, {"greedy": True, "seed": None, "top_p": None}),
        ({"seed": -1, "temperature": 1}, {"seed": 2**32 - 1, "temperature": 1}),
        ({"greedy": False, "top_p": 0.3}, {"greedy": False, "top_p": 0.3}),
        ({"top_k": 5, "temperature": 2}, {"top_k": 5, "temperature": 2.0}),
        ({"temperature": 1e-30}, {"greedy": True, "temperature": None}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 6, "max_tokens": 5}, {"max_new_tokens": 6}),
        ({"no_fidelity": True}, {"no_fidelity": True}),
    ],
)
def test_decoding(served: Served, body: dict[str, Any], expected: dict[str, Any]) -> None:
    (ask,) = chat(served, **body).asks
    assert {name: getattr(ask.decoding, name) for name in expected} == expected
    ask.decoding.generate_options()
    assert not isinstance(ask.decoding.temperature, int)  # which transformers refuses


def test_every_pruning_option_is_a_field(served: Served) -> None:
    own = replace(served, pruning=Pruning(sparsity=0.25, rest="int8"))
    body = {"sparsity": [0.5, 0.5, 0.25], "ffn_skip": 0.2, "ffn_skip_cold": [1, 1], "fold": False, "prior": "off"}
    (ask,) = chat(own, **body).asks
    assert ask.pruning.sparsity == (0.5, 0.5, 0.25)
    assert ask.pruning.rest == "int8"
    assert (ask.pruning.skip.share, ask.pruning.skip.cold) == (0.2, (1, 1))
    assert (ask.pruning.fold, ask.pruning.prior) == (False, "off")
    assert chat(own, sparsity="auto").asks[0].pruning.sparsity is None
    assert chat(own, method=None).asks[0].pruning == own.pruning
    assert chat(served, method="griffin", sparsity=0.5).asks[0].pruning.rest == "drop"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, ("messages is empty",)),
        ({"messages": None}, ("messages is missing",)),
        ({"messages": "Hello"}, ("messages must be a list",)),
        ({"messages": [{"role": "wizard", "content": "x"}]}, ("messages[0].role", "user")),
        ({"messages": [{"role": "user"}]}, ("messages[0].content is missing",)),
        ({"messages": [{"role": "user", "content": 5}]}, ("messages[0].content",)),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ("surrogate",)),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, ("image_url", "text")),
        ({"messages": [{"role": "user", "content": "x", "contnet": "y"}]}, ("unknown field messages[0].contnet",)),
        ({"temperature": "hot"}, ("temperature must be a number",)),
        ({"temperature": True}, ("temperature must be a number",)),
        ({"temperature": -1}, ("temperature must be 0 to 100",)),
        ({"max_tokens": 0}, ("max_tokens",)),
        ({"max_tokens": 1.5}, ("max_tokens must be a whole number",)),
        ({"n": 99}, ("n must be 1 to 16",)),
        ({"stop": [""]}, ("stop",)),
        ({"stop": 5}, ("stop",)),
        ({"logprobs": 2}, ("logprobs must be true or false",)),
        ({"top_logprobs": 2}, ("top_logprobs needs logprobs",)),
        ({"logit_bias": {"x": 1}}, ("logit_bias",)),
        ({"logit_bias": {"5": 1000}}, ("logit_bias",)),
        ({"functions": [{"name": "x"}]}, ("functions is not supported: use tools",)),
        ({"echo": True}, ("echo is not supported",)),
        ({"sparisty": 0.5}, ("unknown field sparisty; is it sparsity?",)),
        ({"sparsity": 2}, ("sparsity 2", "0 (nothing is pruned) to 1")),
        ({"sparsity": "0.5"}, ("sparsity must be a number",)),
        ({"sparsity": [0.5, "x"]}, ("sparsity",)),
        ({"rest": "int3"}, ("int3", "int8")),
        ({"fold": "off"}, ("fold must be true or false",)),
        ({"ffn_skip_cold": [1]}, ("ffn_skip_cold",)),
        ({"prior": "/etc/passwd"}, ("names no file",)),
        ({"compile": True}, ("unknown field compile",)),
        ({"chat_template": "{{ x }}"}, ("unknown field chat_template",)),
        ({"chat_template_kwargs": {"chat_template": "x"}}, ("unknown field chat_template_kwargs.chat_template",)),
        ({"tools": [{"type": "function"}]}, ("tools[0].function is missing",)),
        ({"tools": [{"type": "retrieval"}]}, ("tools[0].type",)),
        ({"tool_choice": "required"}, ("there are no tools",)),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, ("no function",)),
        ({"response_format": {"type": "xml"}}, ("response_format.type",)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, ("schema is missing",)),
        ({"stream_options": {"usage": True}}, ("unknown field stream_options.usage",)),
        ({"modalities": ["audio"]}, ("modalities",)),
        ({"greedy": True, "temperature": 0.5}, ("greedy",)),
    ],
)
def test_what_is_wrong_is_refused_by_name(served: Served, body: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(served, *words, **body)


def test_fields_that_change_no_answer_are_ignored(served: Served) -> None:
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "x"}
    unused = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "functions": [], "logprobs": None}
    assert chat(served, **ignored, **unused) == chat(served)


def test_another_model_is_not_looked_for(served: Served) -> None:
    for name in (served.name, "gpt-tiny"):
        chat(served, model=name)
    with pytest.raises(ApiError) as caught:
        chat(served, model=str(served.engine.path))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_the_limit_of_tokens(served: Served) -> None:
    own = replace(served, limits=Limits(tokens=30))
    prompt = chat(own).asks[0].prompt_ids
    assert chat(own, max_tokens=1000).asks[0].decoding.max_new_tokens == 30 - len(prompt)
    error = refused(own, "at most 30", messages=[{"role": "user", "content": "word " * 50}])
    assert error.code == "context_length_exceeded"


def test_tools(served: Served) -> None:
    asked = chat(served, tools=[WEATHER])
    assert asked.calls
    assert asked.tools == ("weather",)
    assert not asked.forced
    none = chat(served, tools=[WEATHER], tool_choice="none")
    assert none.calls is None
    assert none.asks == chat(served).asks
    forced = chat(served, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    assert forced.forced
    assert forced.one_call
    assert forced.asks[0].prompt_ids[: len(asked.asks[0].prompt_ids)] == asked.asks[0].prompt_ids
    assert forced.asks[0].schema["properties"]["name"] == {"const": "weather"}


def test_choices_have_seeds_of_their_own(served: Served) -> None:
    asks = chat(served, n=3, seed=2**32 - 1, temperature=1).asks
    assert [ask.decoding.seed for ask in asks] == [2**32 - 1, 0, 1]


@pytest.mark.parametrize(
    ("prompt", "expected"), [("Hello", 1), (["Hello", "you"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)]
)
def test_prompts_of_completions(served: Served, engine: Engine, prompt: Any, expected: int) -> None:
    asks = read_completion({"prompt": prompt}, served).asks
    assert len(asks) == expected
    assert all(ask.decoding.max_new_tokens == 16 for ask in asks)
    first = prompt if isinstance(prompt, str) else prompt[0]
    if isinstance(first, str):
        assert asks[0].prompt_ids == engine.encode(first, raw=True)


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [5, "x"], [10**6], {"a": 1}, ["x"] * 17, [True]])
def test_prompts_that_are_none(served: Served, prompt: Any) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        read_completion({"prompt": prompt}, served)
    assert api_error(caught.value).status == 400


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(body)
    assert caught.value.status == 400


def test_the_servers_own_options_hold(served: Served) -> None:
    own = replace(served, decoding=Decoding(temperature=0.7, max_new_tokens=9, no_fidelity=True))
    assert chat(own).asks[0].decoding == own.decoding
    assert chat(own, temperature=0).asks[0].decoding == Decoding(greedy=True, max_new_tokens=9, no_fidelity=True)


JUNK: list[Any] = [
    True,
    -1,
    0,
    1.5,
    1e308,
    10**400,
    "x",
    "\ud800",
    "",
    [],
    {},
    [1],
    ["x"],
    {"a": 1},
    [[{}]],
    {"type": []},
]
OPENAIS = """model messages prompt temperature top_p seed stop n stream stream_options logprobs top_logprobs logit_bias
    presence_penalty frequency_penalty tools tool_choice parallel_tool_calls response_format reasoning_effort modalities
    chat_template_kwargs max_tokens max_completion_tokens user reuse best_of echo suffix"""


@pytest.mark.parametrize("field", [*OPENAIS.split(), *OURS])
def test_whatever_a_field_has_the_request_is_read_or_refused(served: Served, field: str) -> None:
    for read, body in ((read_chat, {"messages": HELLO}), (read_completion, {"prompt": "Hello"})):
        for junk in JUNK:
            for value in (junk, [junk], {"role": junk, "type": junk, "function": junk, "json_schema": junk}):
                try:
                    read({**body, field: value}, served)
                except Exception as error:
                    told = api_error(error)
                    if told.status not in (400, 404):
                        pytest.fail(f"{field} {value}: {error!r}")
                    told.message.encode()
