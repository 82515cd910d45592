"""Rows of a batch end, count and are penalized as each prompt alone."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import EOS_ID, tiny_checkpoint, tiny_prompt, tiny_tokenizer
from transformers import StoppingCriteria

from griffin_offload import Engine

PROMPTS = [tiny_prompt(40), tiny_prompt(9, 1), tiny_prompt(25, 2)]
COUNT = 16


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama") / "m", "llama")


def plain(folder: Path, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": COUNT, "do_sample": False, "tokenizer": tiny_tokenizer(), **options}
    out = oracle.load(folder).generate(ids, attention_mask=torch.ones_like(ids), **options)
    return list(out[0, ids.shape[1] :].tolist())


def changed(folder: Path, out: Path, **fields: Any) -> Path:
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    file = out / "generation_config.json"
    settings = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return out


class After(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose last token is one of these."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("eos", [EOS_ID, None])
@pytest.mark.parametrize("how", ["option", "file", "criterion"])
@pytest.mark.parametrize("last", [True, False])
def test_a_row_that_ends_before_the_others(llama: Path, tmp_path: Path, eos: int | None, how: str, last: bool) -> None:
    """By a stop string, wherever it is given, or by a criterion; with an end token, and without one; at the longest
    that an answer may be, too."""
    tokens = plain(llama, PROMPTS[1])
    texts = [tiny_tokenizer().decode([token]) for token in tokens]
    at = [i for i, text in enumerate(texts) if text.isascii() and tokens.index(tokens[i]) == i and i > 1][-last]
    token, string, count = tokens[at], texts[at], at + 1 if last else COUNT
    folder = changed(llama, tmp_path, eos_token_id=eos, stop_strings=[string] if how == "file" else None)
    options: dict[str, Any] = {"option": {"stop_strings": [string]}, "file": {}}.get(how, {})
    if how == "criterion":
        options = {"stopping_criteria": [After([token])]}
    options |= {"max_new_tokens": count}
    expected = [plain(folder, prompt, **options) for prompt in PROMPTS]
    engine = Engine(folder, device_memory="8GiB")
    answers = engine.generate_batch(PROMPTS, sparsity=0, greedy=True, **options)
    assert [answer.token_ids for answer in answers] == expected
    assert len(expected[1]) <= at + 1
    assert answers[1].finish_reason == "stop"
    assert answers[0].report.tokens == sum(map(len, expected))
    for answer, tokens in zip(answers, expected, strict=True):
        alone = engine.generate(answer.prompt_token_ids, sparsity=0, greedy=True, **options)
        assert (alone.token_ids, alone.text, alone.finish_reason) == (tokens, answer.text, answer.finish_reason)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 3.0},
        {"encoder_repetition_penalty": 0.4},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"min_length": 24},
        {"min_new_tokens": 6},
        {"exponential_decay_length_penalty": [3, 2.0]},
        {"forced_eos_token_id": 50},
        {"begin_suppress_tokens": list(range(100, 200))},
    ],
)
@pytest.mark.parametrize("pad", [None, 0])
def test_penalties_and_lengths_of_a_batch(llama: Path, tmp_path: Path, fields: dict[str, Any], pad: int | None) -> None:
    """Padding, which may be an end token, is none of a row's tokens."""
    ends = sorted({int(plain(llama, prompt)[at]) for prompt, at in zip(PROMPTS, (3, 4, 5), strict=True)})
    folder = changed(llama, tmp_path, eos_token_id=ends, pad_token_id=pad, **fields)
    answers = Engine(folder, device_memory="8GiB").generate_batch(
        PROMPTS, sparsity=0, max_new_tokens=COUNT, greedy=True
    )
    assert [answer.token_ids for answer in answers] == [plain(folder, prompt) for prompt in PROMPTS]
