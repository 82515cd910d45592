"""The next turn of a conversation: its new tokens only, and the same as the sweep over the whole conversation."""

import torch
from cases import Case
from engines import Logits, copying
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.engine import Answer

FIRST, SECOND, THIRD = tiny_prompt(40), tiny_prompt(13, seed=1)[1:], tiny_prompt(10, seed=2)[1:]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def turn(engine: Engine, ids: list[int], **options: object) -> tuple[Answer, torch.Tensor]:
    """A turn's answer, and the logits of its tokens (N, V)."""
    logits = Logits()
    options = {"sparsity": 0.5, "method": "griffin", "continues": True, **GREEDY, **options}
    return engine.generate(ids, logits_processor=[logits], **options), torch.stack(logits.steps)


def assert_as_whole(engine: Engine, whole: Engine, ids: list[int], **options: object) -> Answer:
    """A turn is what the sweep over the whole conversation gives."""
    answer, logits = turn(engine, ids, **options)
    expected, expected_logits = turn(whole, ids, **options, continues=False)
    for mine, own in zip(engine.kept_neurons(), whole.kept_neurons(), strict=True):
        assert [block.tolist() for block in mine] == [block.tolist() for block in own]
    assert answer.token_ids == expected.token_ids
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    return answer


def test_three_turns_of_every_type_are_as_the_sweep_over_the_whole_conversation(every: Case) -> None:
    engine, whole = Engine(every.folder), Engine(every.folder)
    ids = FIRST
    answer, _ = turn(engine, ids)
    assert answer.report.turn
    refused = answer.report.turn.why_not
    for more in (SECOND, THIRD):
        before, ids = len(ids), [*ids, *answer.token_ids, *more]
        answer = assert_as_whole(engine, whole, ids)
        told = answer.report.turn
        assert told
        assert told.why_not == refused
        assert (told.kept_tokens, told.computed_tokens) == ((0, len(ids)) if refused else (before, len(ids) - before))


def test_copied_layers_and_static_steps_change_nothing(case) -> None:
    folder = case("llama").folder
    engine, whole = copying(folder), copying(folder)
    first, _ = turn(engine, FIRST)
    answer = assert_as_whole(engine, whole, [*FIRST, *first.token_ids, *SECOND])
    assert answer.report.turn
    assert answer.report.turn.kept_tokens == len(FIRST)
