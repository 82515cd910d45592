"""Ctrl-C in a turn of a conversation: it goes on from the last point."""

import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import CO_GENERATOR
from typing import Any

import pytest
from cases import Case
from turns import FIRST, PAPER, SECOND, THIRD, WHOLE, assert_as_whole, told, turn

from griffin_offload import Engine


@pytest.fixture
def engine(case: Callable[[str], Case]) -> Engine:
    return Engine(case("llama").folder)


@pytest.fixture
def whole(case: Callable[[str], Case]) -> Engine:
    """Another engine with the same model, which keeps nothing."""
    return Engine(case("llama").folder)


class Interrupt:
    """Raises KeyboardInterrupt at the `at`-th call of a function of the library, while it traces. Counts the calls.

    Generators are left out: closing one is a call too, whose exceptions Python drops."""

    def __init__(self, at: int) -> None:
        self.calls, self._at = 0, at

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if "griffin_offload" in frame.f_code.co_filename and not frame.f_code.co_flags & CO_GENERATOR:
            self.calls += 1
            if self.calls == self._at:
                raise KeyboardInterrupt

    def __enter__(self) -> "Interrupt":
        sys.settrace(self)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon_h1"])
def test_ctrl_c_anywhere_in_a_turn_leaves_a_conversation_that_goes_on(case: Callable[[str], Case], kind: str) -> None:
    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    options = {**PAPER, "max_new_tokens": 3}
    first, _ = turn(engine, FIRST, **options)
    second, third = ([*FIRST, *first.token_ids, *more] for more in (SECOND, THIRD))
    expected = turn(whole, third, **options, continues=False)[0].token_ids
    with Interrupt(0) as counted:
        turn(engine, second, **options)
    for at in range(7, counted.calls, counted.calls // 25):
        turn(engine, FIRST, **options)
        with suppress(KeyboardInterrupt), Interrupt(at):  # behind the first token it ends the answer
            turn(engine, second, **options)
        assert turn(engine, third, **options)[0].token_ids == expected


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_5_text", "falcon_h1"])
def test_an_interrupted_pass_is_as_if_it_had_not_begun(case: Callable[[str], Case], kind: str, layer: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == layer:
            raise KeyboardInterrupt

    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    first, _ = turn(engine, FIRST, **PAPER)
    with pytest.raises(KeyboardInterrupt):
        turn(engine, [*FIRST, *first.token_ids, *SECOND], **PAPER, on_layer=interrupt)
    answer = assert_as_whole(engine, whole, [*FIRST, *first.token_ids, *THIRD], **PAPER)
    if kind != "gemma2" or not layer:
        assert told(answer).kept_tokens == len(FIRST)
    else:  # a window of 16 tokens has no room for 20 more
        assert told(answer).why_not == "its sliding windows have moved on"


@pytest.mark.parametrize("options", [PAPER, WHOLE])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "granitemoehybrid-mamba"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_answer_interrupted_within_a_forward(
    case: Callable[[str], Case], kind: str, options: dict[str, Any], layer: int
) -> None:
    engine, whole = Engine(case(kind).folder), Engine(case(kind).folder)
    forwards = 0

    def interrupt(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 4:
            raise KeyboardInterrupt

    handle = engine.skeleton.modules[layer].register_forward_hook(interrupt)
    first, _ = turn(engine, FIRST, no_fidelity=True, **options)
    handle.remove()
    assert first.finish_reason == "interrupted"
    ids = [*FIRST, *first.token_ids, *SECOND]
    answer = assert_as_whole(engine, whole, ids, **options)
    there = 0 if options is PAPER else 2 + (layer == 2)  # the answer's tokens that all layers have computed
    if kind == "granitemoehybrid-mamba" and layer < 2:
        there = 0  # layers with recurrent states are not of the same token
    assert told(answer).kept_tokens == len(FIRST) + there


def test_a_window_interrupted_while_it_changes_is_not_used(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_offload.model.cache_layers import Room

    folder = case("mistral").folder
    engine, whole = Engine(folder), Engine(folder)
    first, _ = turn(engine, FIRST, **PAPER)
    put, calls = Room.put, 0

    def interrupt(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Room, "put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            turn(engine, [*FIRST, *first.token_ids, *SECOND], **PAPER)
    answer = assert_as_whole(engine, whole, [*FIRST, *first.token_ids, *THIRD], **PAPER)
    assert told(answer).why_not == "its sliding windows have moved on"
