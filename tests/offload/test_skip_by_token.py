"""Skipped blocks against plain transformers with z at zero, one token and one block at a time."""

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from skipping import LAYERS, TOKENS, greedy, prompt_similarity, similarity, width
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.options import FfnSkip
from griffin_offload.pruning.ffn_skip import WINDOW, Thresholds


def skipped_slowly(model: Any, prompt: list[int], skip: FfnSkip, tokens: int) -> tuple[list[int], list[list[int]]]:
    """The answer's greedy tokens, and the blocks that each of its tokens left out."""
    table = prompt_similarity(model, prompt)
    thresholds, target, in_window = Thresholds(table, skip), skip.share, 0
    logits, cache = oracle._forward(model, prompt, None)
    answer, left_out = [int(logits[-1].argmax())], []
    blocks = oracle.blocks(model)
    while len(answer) < tokens and answer[-1] not in oracle.end_tokens(model):
        off: set[int] = set()
        left = 0
        for block in range(LAYERS):
            cold = block < max(1, skip.cold[0]) or block >= LAYERS - skip.cold[1]
            if len(left_out) < skip.warmup:
                break
            if left and not cold:
                off.add(block)
                left -= 1
            else:
                saturated = float(similarity(model, answer[-1:], cache, off, block)) >= thresholds.of(target)
                left = skip.length(LAYERS) if saturated else 0
        with oracle._masked(model, [torch.arange(0 if b.layer in off else width(b)) for b in blocks]):
            logits, cache = oracle._forward(model, answer[-1:], cache)
        answer.append(int(logits[-1].argmax()))
        left_out.append(sorted(off))
        after = len(left_out) - skip.warmup
        in_window += len(off)
        if after > 0 and after % WINDOW == 0:
            target = min(1.0, max(0.0, target + skip.share - in_window / (WINDOW * LAYERS)))
            in_window = 0
    return answer, left_out


def shares(left_out: list[list[int]]) -> list[float]:
    return [sum(block in off for off in left_out) / len(left_out) for block in range(LAYERS)]


@pytest.mark.parametrize("skip", [FfnSkip(0.25, cold=(1, 1)), FfnSkip(0.5, cold=(0, 0), warmup=0, run=2)])
def test_each_token_skips_what_the_slow_rule_does(deep: Path, skip: FfnSkip) -> None:
    prompt = tiny_prompt()
    expected, left_out = skipped_slowly(oracle.load(deep), prompt, skip, TOKENS)
    found = greedy(Engine(deep), prompt, skip)
    assert found.token_ids == expected
    assert found.report.skipped
    assert list(found.report.skipped.by_layer) == pytest.approx(shares(left_out))
    assert any(left_out), "the test would say nothing"


def test_share_0_is_no_skipping(deep: Path) -> None:
    engine = Engine(deep)
    assert greedy(engine, tiny_prompt(), FfnSkip(0.0)).token_ids == greedy(engine, tiny_prompt(), None).token_ids


def test_share_1_is_the_model_without_the_blocks_between_the_cold_ends(deep: Path) -> None:
    skip = FfnSkip(1.0, cold=(1, 2), warmup=0)
    model = oracle.load(deep)
    kept = [torch.arange(0 if 1 <= b.layer < LAYERS - 2 else width(b)) for b in oracle.blocks(model)]
    expected, _ = oracle.masked_generate(model, tiny_prompt(), kept, TOKENS)
    found = greedy(Engine(deep), tiny_prompt(), skip)
    assert found.token_ids == expected
    assert found.report.skipped
    assert found.report.skipped.by_layer == (0, 1, 1, 1, 0, 0)


def test_the_first_tokens_and_the_cold_ends_skip_nothing(llama: Path) -> None:
    full = greedy(Engine(llama), tiny_prompt(), None)
    late = greedy(Engine(llama), tiny_prompt(), FfnSkip(1.0, cold=(2, 1), warmup=10))
    made = len(late.token_ids) - 1
    assert late.token_ids[:11] == full.token_ids[:11]  # the prompt gives the first, ten passes the others
    assert late.report.skipped
    assert late.report.skipped.by_layer == pytest.approx([0, 0] + [(made - 10) / made] * 3 + [0])
    assert greedy(Engine(llama), tiny_prompt(), FfnSkip(1.0, cold=(3, 3))).token_ids == full.token_ids


@pytest.mark.parametrize("how", [{}, {"sparsity": 0.5}, {"resident_dtype": "int8"}, {"sparsity": 0.5, "rest": "int8"}])
def test_a_resident_model_skips_as_a_swept_one(llama: Path, how: dict[str, Any]) -> None:
    engine, skip = Engine(llama), FfnSkip(0.5, cold=(1, 1), warmup=2)
    plain = greedy(engine, tiny_prompt(), None, **how)
    first, again = greedy(engine, tiny_prompt(), skip, **how), greedy(engine, tiny_prompt(), skip, **how)
    assert first.token_ids == again.token_ids != plain.token_ids
    assert first.report.skipped == again.report.skipped
    assert greedy(engine, tiny_prompt(), None, **how).token_ids == plain.token_ids, "nothing of it is left behind"


def test_the_bytes_of_skipped_blocks_are_not_counted(llama: Path) -> None:
    report = greedy(Engine(llama), tiny_prompt(), FfnSkip(1.0, cold=(1, 1), warmup=0), 0.5).report
    blocks = [3 * 32 * 48 * 4] * 4
    assert report.bytes_per_token == report.plan.bytes_per_token - sum(blocks)
    assert report.to_json()["ffn_skip"] == {
        "mode": "token",
        "asked": 1.0,
        "reached": pytest.approx(4 / 6),
        "by_layer": (0, 1, 1, 1, 1, 0),
    }
    assert dict(report.rows())["skipped blocks"] == "66.7% of 100.0% asked; by layer, in %: 0 100 100 100 100 0"


def test_an_answer_of_one_token_skips_nothing(llama: Path) -> None:
    found = Engine(llama).generate(tiny_prompt(), sparsity=0.0, skip=FfnSkip(0.5), max_new_tokens=1)
    assert found.report.skipped
    assert found.report.skipped.share == 0


def test_several_prompts_are_refused(llama: Path) -> None:
    with pytest.raises(OptionError, match="one prompt at a time, not for 2"):
        Engine(llama).generate_batch([tiny_prompt(), tiny_prompt()], skip=FfnSkip(0.25))


def test_an_interrupt_leaves_nothing_behind(llama: Path) -> None:
    engine = Engine(llama)
    full = greedy(engine, tiny_prompt(), None)
    said: list[str] = []

    def interrupt(text: str) -> None:
        said.append(text)
        if len(said) == 12:
            raise KeyboardInterrupt

    found = greedy(engine, tiny_prompt(), FfnSkip(1.0, warmup=0), on_text=interrupt)
    assert found.finish_reason == "interrupted"
    assert greedy(engine, tiny_prompt(), None).token_ids == full.token_ids


# Exports
