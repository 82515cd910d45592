"""Turns of a conversation, each held against the sweep over the whole of it."""

from typing import Any

import torch
from engines import Logits
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.engine import Answer
from griffin_offload.planning.turn import Turn

FIRST, SECOND, THIRD = tiny_prompt(40), tiny_prompt(13, seed=1)[1:], tiny_prompt(10, seed=2)[1:]
PAPER = {"sparsity": 0.5, "method": "griffin"}
WHOLE = {"sparsity": 0.0}


def turn(engine: Engine, ids: list[int], **options: Any) -> tuple[Answer, torch.Tensor]:
    """A turn's answer, and the logits of its tokens (N, V)."""
    logits = Logits()
    options = {"continues": True, "do_sample": False, "max_new_tokens": 8, **options}
    return engine.generate(ids, logits_processor=[logits], **options), torch.stack(logits.steps)


def assert_as_whole(engine: Engine, whole: Engine, ids: list[int], **options: Any) -> Answer:
    """A turn is what the sweep over the whole conversation gives: neurons, statistics, tokens and logits."""
    answer, logits = turn(engine, ids, **options)
    expected, expected_logits = turn(whole, ids, **options, continues=False)
    for mine, own in zip(engine.resident.layers, whole.resident.layers, strict=True):
        assert [each.tolist() for each in mine.kept_neurons] == [each.tolist() for each in own.kept_neurons]
        torch.testing.assert_close(mine.statistics, own.statistics, rtol=1e-4, atol=1e-5, check_device=False)
    assert answer.token_ids == expected.token_ids
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    return answer


def told(answer: Answer) -> Turn:
    assert answer.report.turn
    assert answer.report.to_json()["turn"] == answer.report.turn.to_json()
    return answer.report.turn
