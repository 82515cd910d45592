"""Rotary embeddings that change with the length: a prompt is read in a batch, and after others, as it is alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine

SWITCH, COUNT = 40, 14
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": SWITCH,
}
MSCALE = {"short_mscale": 1.1, "long_mscale": 1.2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": SWITCH}),
    "phimoe-longrope": ("phimoe", {"rope_parameters": LONG | MSCALE, "original_max_position_embeddings": SWITCH}),
    "llama-longrope": ("llama", {"rope_parameters": LONG}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": SWITCH},
    ),
}
PROMPTS = [
    tiny_prompt(SWITCH + 20),
    tiny_prompt(SWITCH - 4, 1),
    tiny_prompt(SWITCH + 2, 2),
    tiny_prompt(SWITCH // 2, 3),
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, settings = KINDS[request.param]
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "m", kind, **settings)


def plain(folder: Path, prompt: list[int]) -> list[int]:
    """transformers' own greedy answer, by a model that has read nothing before."""
    ids = torch.tensor([prompt])
    out = oracle.load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (1, 3), (0, 1), (2, 3)])
def test_a_batch_answers_as_each_prompt_alone(folder: Path, rows: tuple[int, ...]) -> None:
    prompts = [PROMPTS[row] for row in rows]
    engine = Engine(folder, device_memory="8GiB")
    answers = engine.generate_batch(prompts, sparsity=0, max_new_tokens=COUNT, greedy=True)
    assert [answer.token_ids for answer in answers] == [plain(folder, prompt) for prompt in prompts]


def test_one_prompt_after_the_other(folder: Path) -> None:
    engine = Engine(folder, device_memory="8GiB")
    for prompt in (*PROMPTS, *reversed(PROMPTS)):
        got = engine.generate(prompt, sparsity=0, max_new_tokens=COUNT, greedy=True)
        assert got.token_ids == plain(folder, prompt)


@pytest.mark.parametrize("options", [{"sparsity": 0.5, "rest": "drop"}, {"sparsity": 0, "resident_dtype": "int8"}])
def test_a_pruned_answer_in_a_batch_is_that_alone(folder: Path, options: dict[str, Any]) -> None:
    """Across the switch too: nothing is read again by less than the full model."""
    options = {**options, "max_new_tokens": COUNT, "greedy": True}
    engine = Engine(folder, device_memory="8GiB")
    alone = [engine.generate(prompt, **options).token_ids for prompt in PROMPTS]
    together = engine.generate_batch(PROMPTS, per_prompt=True, **options)
    assert [answer.token_ids for answer in together] == alone
    for prompt in PROMPTS:
        reads: list[int] = []
        hook = engine.skeleton.modules[0].register_forward_pre_hook(
            lambda _, args, reads=reads: reads.append(args[0].shape[1])
        )
        engine.generate(prompt, no_fidelity=True, **options)
        hook.remove()
        assert reads[0] == len(prompt)
        assert set(reads[1:]) == {1}


def test_reading_again_at_the_switch_is_in_the_plan(folder: Path) -> None:
    engine = Engine(folder, device_memory="8GiB")
    named = [row.name for row in engine.plan(SWITCH - 4, COUNT, sparsity=0).rows]
    assert ("the text again" in named) == engine.skeleton.config.model_type.startswith("phi")
    for tokens in (SWITCH + 1, SWITCH - COUNT):
        assert "the text again" not in [row.name for row in engine.plan(tokens, COUNT, sparsity=0).rows]
    assert "the text again" not in [row.name for row in engine.plan(SWITCH - 4, COUNT, sparsity=0.5).rows]


def masked(folder: Path, prompt: list[int]) -> list[int]:
    """The answer of the full model with the other neurons set to zero, as each forward of transformers has it."""
    model = oracle.load(folder)
    return oracle.masked_generate(model, prompt, oracle.experts(model, prompt, 0.5), COUNT)[0]


def test_a_pruned_answer_is_the_masked_models(folder: Path, tmp_path: Path) -> None:
    """Where an answer may pass the switch of a type that would read all again there, it is the answer of a model that
    has the long factors alone. transformers' PhiMoE has one kind of factors, and changes its scale."""
    engine = Engine(folder, device_memory="8GiB")
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    long = ["long_mscale"] if config["model_type"] == "phimoe" else ["long_factor"] if "long_factor" in rope else []
    always_long = {name.replace("long", "short"): rope[name] for name in long}
    changed = tmp_path / "long"
    shutil.copytree(folder, changed)
    (changed / "config.json").write_text(json.dumps(config | {"rope_parameters": rope | always_long}))
    for prompt in (tiny_prompt(SWITCH - COUNT), *PROMPTS):
        crosses = len(prompt) <= SWITCH < len(prompt) + COUNT and config["model_type"].startswith("phi")
        expected = masked(changed if crosses else folder, prompt)
        answer = engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=COUNT, greedy=True)
        assert answer.token_ids == expected, len(prompt)
