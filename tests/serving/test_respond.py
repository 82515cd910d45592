"""One request on the engine: cancelled anywhere, it leaves an engine that answers as before."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from griffin_offload import Engine
from griffin_offload.serving.asked import read_chat
from griffin_offload.serving.respond import Cancelled, Delta, Ended, Responder
from griffin_offload.serving.served import Served

HELLO = [{"role": "user", "content": "Hello you there, tell me of the sea and the sky"}]


def never() -> bool:
    return False


def text(responder: Responder, served: Served, cancelled: Callable[[], bool] = never, **body: Any) -> tuple[str, Ended]:
    events = list(responder.respond(read_chat({"messages": HELLO, **body}, served), cancelled))
    assert isinstance(events[-1], Ended)
    return "".join(event.piece.text for event in events if isinstance(event, Delta)), events[-1]


class After:
    """True from its n-th call on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"sparsity": 0.5, "method": "griffin"},
        {"sparsity": 0.5, "rest": "drop", "lossless": True},
        {"sparsity": 0.5, "rest": "drop", "fold": False, "refresh": 5},
    ],
)
def test_a_cancelled_request_changes_no_other(served: Served, body: dict[str, Any], resident: bool) -> None:
    responder, engine = Responder(served), served.engine
    engine.unload()
    expected, _ = text(responder, served, **body)

    def ready() -> None:
        """The next request finds what the last one left, or reads the weights."""
        if resident:
            assert text(responder, served, **body)[0] == expected
        else:
            engine.unload()

    ready()
    calls = After(10**9)
    text(responder, served, calls, **body)
    asked = 10**9 - calls.left
    assert asked >= 12 + (not resident)  # at each token; before each layer where the prompt is computed
    for number in range(asked):
        ready()
        with pytest.raises(Cancelled):
            text(responder, served, After(number), **body)
        assert not any(layer._forward_pre_hooks for layer in engine.skeleton.modules)
        assert text(responder, served, **body)[0] == expected


def test_the_prompt_pass_of_resident_weights_can_be_cancelled(served: Served) -> None:
    responder = Responder(served)
    text(responder, served, reuse=False)
    calls = After(10**9)
    _, ended = text(responder, served, calls, reuse=False)
    assert 10**9 - calls.left == ended.tokens + len(served.engine.skeleton.modules)


@pytest.mark.parametrize(
    "body",
    [
        {"sparsity": 0.5, "rest": "drop", "fold": False},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}},
        {"presence_penalty": 1.0, "logprobs": True, "stop": ["zz"]},
    ],
)
def test_where_layers_are_copied_as_on_a_gpu_it_is_the_same(served: Served, body: dict[str, Any]) -> None:
    copying = replace(served, engine=Engine(served.engine.path, copies=True))
    for _ in range(2):
        expected, ended = text(Responder(served), served, **body)
        assert text(Responder(copying), copying, **body)[0] == expected
    with pytest.raises(Cancelled):
        text(Responder(copying), copying, After(4), **body)
    assert text(Responder(copying), copying, **body)[0] == expected
    assert ended.tokens


def test_reuse_can_be_refused(served: Served) -> None:
    responder = Responder(served)
    text(responder, served)
    assert text(responder, served)[1].cached > 0
    _, ended = text(responder, served, reuse=False)
    assert (ended.cached, ended.report.turn) == (0, None)


def test_a_stop_string_ends_the_answer_there(served: Served) -> None:
    responder = Responder(served)
    whole, ended = text(responder, served, max_tokens=30)
    stop = whole[8:10]
    cut, at_stop = text(responder, served, max_tokens=30, stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert (at_stop.reason, ended.reason) == ("stop", "length")
    assert at_stop.tokens < ended.tokens


def test_grammars_count_in_every_plan(served: Served) -> None:
    responder, engine = Responder(served), served.engine
    before = engine.opened.runtime
    text(
        responder, served, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 5}}}
    )
    assert engine.opened.runtime >= before
    assert responder._grammars.ready
