"""Requests to `griffin serve` without an end: of fields, messages, brackets, grammars. Each is refused or soon done."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import TOOLS_TEMPLATE, WEATHER
from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import GriffinError
from griffin_offload.serving.api_error import ApiError
from griffin_offload.serving.asked import read_chat, read_completion
from griffin_offload.serving.fields import parse_body
from griffin_offload.serving.grammar import Grammars
from griffin_offload.serving.served import Served

pytestmark = pytest.mark.fault

HELLO = {"role": "user", "content": "Hello"}
NUMBER = json.dumps(10**400)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    engine = Engine(tiny_checkpoint(tmp_path_factory.mktemp("requests") / "m", "llama", chat=True))
    engine.tokenizer.chat_template = TOOLS_TEMPLATE
    return Served(engine)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


BODIES: dict[str, bytes] = {
    "lists within lists": b"[" * 10**6,
    "objects within objects": b'{"a":' * 10**6,
    "a number of 5000 digits": b'{"max_tokens":' + b"9" * 5000 + b"}",
    "half a character": b'{"messages": "\xff"}',
    "no JSON number": b'{"temperature": NaN}',
    "nothing": b"",
}
CHATS: dict[str, dict[str, Any]] = {
    "n": {"n": 10**9},
    "n of 400 digits": {"n": 10**400},
    "max_tokens of 400 digits": {"max_tokens": -(10**400)},
    "top_logprobs": {"logprobs": True, "top_logprobs": 10**9},
    "temperature": {"temperature": 10**400},
    "a temperature below 0": {"temperature": -1e-320},
    "top_p": {"top_p": 1e308},
    "top_k": {"top_k": 10**30},
    "refresh": {"refresh": 10**400},
    "stop lists": {"stop": ["a"] * 17},
    "stop texts": {"stop": [""]},
    "a bias of no token": {"logit_bias": {"9" * 4000: 1}},
    "a bias in another script": {"logit_bias": {"\u00b2": 1}},
    "a bias beyond a float": {"logit_bias": {"5": 10**400}},
    "an unknown field": {"x" * 10**5: 1},
    "no messages": {"messages": []},
    "messages of nothing": {"messages": [None] * 10**5},
    "messages beyond the context": {"messages": [HELLO] * 20_000},
    "a message beyond the context": {"messages": [{"role": "user", "content": "word " * 800_000}]},
    "parts beyond the context": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10**5}]},
    "tools beyond the context": {"tools": [WEATHER] * 5000},
    "a tool nested too deep": {"tools": [{"function": {"name": "f", "parameters": nested(900)}}]},
    "a template": {"chat_template": "{% for i in range(9) %}{% endfor %}"},
}
GRAMMARS: dict[str, Any] = {
    "a pattern of patterns": {"type": "string", "pattern": "((a{1,999}){1,999}){1,999}"},
    "a list of lists": {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
    "a text of a length": {"type": "string", "minLength": 10**12},
    "itself": {"$ref": "#"},
    "another machine's": {"$ref": "http://localhost:1/x"},
    "one of many": {"enum": [f"{number} " * 9 for number in range(50_000)]},
    "all of many": {"allOf": [{"anyOf": [{"const": a}, {"type": "object"}]} for a in range(200)]},
    "nested": nested(600),
    "properties": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(20_000)}},
}


def soon(act: Callable[[], Any], seconds: float = 5.0) -> None:
    start = time.process_time()
    try:
        act()
    finally:
        assert time.process_time() - start < seconds


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_none(what: str) -> None:
    with pytest.raises(ApiError, match="the body"):
        soon(lambda: parse_body(BODIES[what]))


@pytest.mark.parametrize("what", CHATS)
def test_a_field_without_an_end(what: str, served: Served) -> None:
    with pytest.raises((GriffinError, ApiError)):
        soon(lambda: read_chat({"messages": [HELLO], **CHATS[what]}, served))


@pytest.mark.parametrize("prompt", [["a"] * 17, [10**30], [-1], "word " * 800_000, [[1] * 10**6]])
def test_prompts_of_the_older_kind(prompt: Any, served: Served) -> None:
    with pytest.raises((GriffinError, ApiError)):
        soon(lambda: read_completion({"prompt": prompt}, served))


@pytest.mark.parametrize("what", GRAMMARS)
def test_a_grammar_without_an_end(what: str, served: Served) -> None:
    grammars = Grammars(served.engine)
    grammars.load()

    def make() -> None:
        try:
            grammars.make(GRAMMARS[what]).allowed()
        except (GriffinError, ApiError):
            return

    soon(make)
