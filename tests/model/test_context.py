"""The context is as long as the rope settings make it."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
from tiny import CONTEXT, tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import ContextError, OptionError, PromptError

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 4.0}
# Rope settings of a config whose max_position_embeddings is CONTEXT -> tokens that the model reads.
LENGTHS: list[tuple[str, dict[str, Any], int]] = [
    ("qwen2", YARN | {"original_max_position_embeddings": CONTEXT}, 4 * CONTEXT),
    ("qwen2", YARN, 4 * CONTEXT),
    ("qwen2", YARN | {"original_max_position_embeddings": CONTEXT // 4}, CONTEXT),  # raised by the factor already
    ("llama", {"rope_type": "dynamic", "factor": 4.0}, 4 * CONTEXT),
    ("llama", {"rope_type": "linear", "factor": 2.0}, 2 * CONTEXT),
    ("llama", {"rope_type": "longrope", "factor": 4.0} | FACTORS, 4 * CONTEXT),
    ("llama", {"rope_type": "longrope", "original_max_position_embeddings": 64} | FACTORS, CONTEXT),
    (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        CONTEXT,
    ),
    ("gpt2", {"rope_type": "yarn", "factor": 4.0}, CONTEXT),  # has a table of positions, and ignores the rest
]


@pytest.mark.parametrize(("kind", "scaling", "length"), LENGTHS)
def test_a_prompt_up_to_the_context_is_answered(
    tmp_path: Path, kind: str, scaling: dict[str, Any], length: int
) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    changes = {"rope_scaling": scaling, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config | changes))
    engine, model = Engine(folder, device_memory="8GiB"), oracle.load(folder)
    assert engine.context_length == length
    for tokens in (CONTEXT - 10, min(length, CONTEXT + 44) - 10):
        got = engine.generate(tiny_prompt(tokens), sparsity=0, max_new_tokens=20, greedy=True).token_ids
        count = min(20, length - tokens)
        assert got == oracle.full_generate(model, tiny_prompt(tokens), count)[0]
        assert len(got) == count
    with pytest.raises(PromptError, match=f"reads at most {length}"):
        engine.plan(length)


def test_a_context_that_is_asked_for_bounds_the_plan_and_refuses_longer_prompts(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", "llama")
    engine, whole = Engine(folder, context=40), Engine(folder)
    assert (engine.context_length, whole.context_length) == (40, 256)

    def cache(engine: Engine) -> int:
        plan = engine.plan(30, 200, sparsity=0.5)
        return next(row.bytes for row in plan.rows if row.name == "KV cache with the answer")

    assert cache(engine) < cache(whole)
    ids = tiny_prompt(30)
    answer = engine.generate(ids, sparsity=0.5, max_new_tokens=200, greedy=True)
    assert len(answer.token_ids) == answer.report.plan.max_new_tokens == 10
    assert answer.finish_reason == "length"
    expected = whole.generate(ids, sparsity=0.5, max_new_tokens=10, greedy=True)
    assert answer.token_ids == expected.token_ids
    with pytest.raises(ContextError, match=r"has 40 tokens; .* reads at most 40 \(--context\), answer included"):
        engine.generate(tiny_prompt(40), sparsity=0.5)
    with pytest.raises(OptionError, match=r"--context 300: .* reads at most 256"):
        Engine(folder, context=300)
    assert not Engine(folder, context=256).sizes.bounded


def test_the_models_prior_is_the_same_whatever_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", "llama", chat=True)
    priors = []
    for number, context in enumerate((16, None)):
        monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / str(number)))
        prior = Engine(folder, context=context).prior()
        assert prior is not None
        priors.append([block.tolist() for layer in prior.scores for block in layer])
    assert priors[0] == priors[1]
