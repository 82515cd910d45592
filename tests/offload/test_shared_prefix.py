"""Prompts that begin alike: their beginning is computed once, and all is as if each had been computed whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying
from tiny import tiny_checkpoint, tiny_prompt
from transformers import LogitsProcessor

from griffin_offload import Engine
from griffin_offload.engine import Answer
from griffin_offload.errors import OptionError

PREFIX = tiny_prompt(24)
LENGTHS = (3, 9, 30, 1)  # of what follows: the shortest is padded by more than the prefix has
PROMPTS = [[*PREFIX, *tiny_prompt(length + 1, seed=number + 1)[1:]] for number, length in enumerate(LENGTHS)]
OTHERS = [[*PREFIX, *tiny_prompt(length + 1, seed=number + 11)[1:]] for number, length in enumerate((5, 5, 2))]
PAPER = {"sparsity": 0.5, "method": "griffin"}
WAYS: list[dict[str, Any]] = [
    PAPER,
    {**PAPER, "per_prompt": True},
    {"sparsity": 0.0},
    {"sparsity": 0.0, "per_prompt": True},
    {"sparsity": 0.5, "rest": "int4"},
    {"sparsity": 0.0, "resident_dtype": "int8"},
    {"sparsity": 0.5, "rest": "drop", "fold": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


class AllLogits(LogitsProcessor):
    """Keeps the logits that every token of every row is chosen from."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores.clone())
        return scores


def answered(engine: Engine, prompts: list[list[int]], **options: Any) -> tuple[list[Answer], torch.Tensor]:
    """The answers, and all logits in the order in which they came."""
    logits = AllLogits()
    options = {"greedy": True, "max_new_tokens": 8, "logits_processor": [logits], **options}
    return engine.generate_batch(prompts, **options), torch.cat(logits.steps)


def assert_as_without(engine: Engine, whole: Engine, prompts: list[list[int]], **options: Any) -> list[Answer]:
    mine, logits = answered(engine, prompts, shared=len(PREFIX), **options)
    own, expected = answered(whole, prompts, **options)
    assert [answer.token_ids for answer in mine] == [answer.token_ids for answer in own]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for layer, other in zip(engine.resident.layers, whole.resident.layers, strict=True):
        assert [each.tolist() for each in layer.kept_neurons] == [each.tolist() for each in other.kept_neurons]
        torch.testing.assert_close(layer.statistics, other.statistics, rtol=1e-4, atol=1e-5)
    return mine


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_batches_are_as_without_sharing(case: Callable[[str], Case], options: dict[str, Any]) -> None:
    engine, whole = Engine(case("llama").folder), Engine(case("llama").folder)
    for prompts in (PROMPTS, OTHERS):
        told = assert_as_without(engine, whole, prompts, **options)[0].report
        assert told.shared is not None
        assert told.shared.tokens == len(PREFIX)
        assert told.plan.pass_tokens == max(map(len, prompts)) - len(PREFIX)
        assert told.to_json()["shared"] == {"tokens": 24, "why_not": ""}


def test_every_type_shares_or_says_why_not(every: Case) -> None:
    engine, whole = Engine(every.folder), Engine(every.folder)
    told = assert_as_without(engine, whole, PROMPTS, **PAPER)[0].report.shared
    assert told is not None
    assert (told.tokens == 0) == (told.why_not != "")
    if every.kind in ("llama", "mistral", "gemma3_text", "qwen2", "qwen2_moe", "opt", "phi3", "gpt2"):
        assert told.tokens


def shared(engine: Engine, prompts: list[list[int]] = PROMPTS, tokens: int = len(PREFIX), **options: Any) -> Any:
    (first, *_), _ = answered(engine, prompts, shared=tokens, **options)
    return first.report.shared


def test_the_prefix_is_computed_once_for_all_batches(case: Callable[[str], Case]) -> None:
    engine = Engine(case("llama").folder)
    shared(engine, **PAPER)
    prefix = engine.resident.prefix
    assert prefix is not None
    assert prefix.ids == PREFIX
    shared(engine, OTHERS, **PAPER)
    assert engine.resident.prefix is prefix
    shared(engine, OTHERS, **PAPER, per_prompt=True)
    assert engine.resident.prefix is prefix
    shared(engine, OTHERS, tokens=20, **PAPER)  # another beginning
    assert engine.resident.prefix is not None
    assert engine.resident.prefix.ids == PREFIX[:20]
    answered(engine, OTHERS, **PAPER)  # nothing stays that the plan does not count
    assert engine.resident.prefix is None


def test_other_options_choose_by_statistics_of_their_own(case: Callable[[str], Case]) -> None:
    engine, whole = Engine(case("llama").folder), Engine(case("llama").folder)
    for options in ({"sparsity": 0.0}, PAPER, {"sparsity": 0.0}, {**PAPER, "sparsity": [0.5, 0.0, 0.5]}, PAPER):
        told = assert_as_without(engine, whole, PROMPTS, **options)[0].report.shared
        assert told is not None
        assert told.tokens == len(PREFIX)


def test_its_bytes_and_seconds_are_the_first_batchs(case: Callable[[str], Case]) -> None:
    engine = Engine(case("llama").folder)
    reports = [answered(engine, PROMPTS, shared=len(PREFIX), sparsity=0.0)[0][0].report for _ in range(2)]
    assert reports[0].bytes_read > engine.checkpoint.bytes // 2 > reports[1].bytes_read


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_prefix_is_no_longer_than_what_sliding_windows_keep(tmp_path: Path, kind: str, sparsity: float) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind, sliding_window=10)
    engine, whole = Engine(folder), Engine(folder)
    options = {"sparsity": sparsity, "method": "griffin"} if sparsity else {"sparsity": 0.0}
    for prompts in (PROMPTS, OTHERS):
        told = assert_as_without(engine, whole, prompts, **options)[0].report.shared
        assert told is not None
        assert told.tokens == 20


def test_why_nothing_is_shared(case: Callable[[str], Case]) -> None:
    folder = case("llama").folder
    fold = assert_as_without(Engine(folder), Engine(folder), PROMPTS, sparsity=0.5, rest="drop")[0].report.shared
    assert fold is not None
    assert "the fold" in fold.why_not
    assert "to cpu again" in shared(copying(folder), **PAPER).why_not
    assert shared(copying(folder), sparsity=0.0).tokens == len(PREFIX)
    engine = Engine(folder)
    assert shared(engine, PROMPTS[:1], **PAPER) is None
    with pytest.raises(OptionError, match="shared 25"):
        shared(engine, tokens=25)


def test_a_prompt_that_is_the_prefix_computes_its_last_token(case: Callable[[str], Case]) -> None:
    engine, whole = Engine(case("llama").folder), Engine(case("llama").folder)
    told = assert_as_without(engine, whole, [PREFIX, *OTHERS], **PAPER)[0].report.shared
    assert told is not None
    assert told.tokens == len(PREFIX) - 1
