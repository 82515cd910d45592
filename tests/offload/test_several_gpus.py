"""Layers on two GPUs; skipped where there are fewer. tests/offload/test_hops.py runs the same lines without one."""

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from emulator import CARDS
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.planning import cards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here"),
]
BOTH = "cuda:0,cuda:1"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer on the first GPU, the others on the second, however much room there is."""
    monkeypatch.setattr(cards, "spans", lambda sizes, request, kept: [1, len(kept)])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt", "mixtral"])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_tokens_are_the_oracles(tmp_path: Path, kind: str, sparsity: float) -> None:
    folder, prompt = tiny_checkpoint(tmp_path / kind, kind), tiny_prompt()
    engine, model = Engine(folder, device=BOTH, dtype="float32"), oracle.load(folder)
    expected, _ = oracle.masked_generate(model, prompt, oracle.experts(model, prompt, sparsity), 8)
    for _ in range(2):
        answer = engine.generate(prompt, sparsity=sparsity, method="griffin", max_new_tokens=8, do_sample=False)
        assert answer.token_ids == expected
        assert answer.report.plan.ends == (1, 3)


OPTIONS: dict[str, dict[str, Any]] = {
    "a fold": {"sparsity": 0.5, "rest": "drop", "prior": "off"},
    "int8": {"resident_dtype": "int8"},
    "int4 for the rest": {"sparsity": 0.5, "rest": "int4"},
    "lossless": {"sparsity": 0.5, "rest": "int4", "lossless": True},
}


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_way_to_answer_is_that_of_one_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    """In float32, whose sums differ too little to change a token."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    one, both = (Engine(folder, device=device, dtype="float32") for device in ("cuda", BOTH))
    for seed in range(2):
        expected, answer = (
            engine.generate(tiny_prompt(40, seed), max_new_tokens=8, do_sample=False, **options)
            for engine in (one, both)
        )
        assert answer.token_ids == expected.token_ids


def test_a_model_that_fits_no_single_gpu_of_this_budget_is_resident_on_both(tmp_path: Path) -> None:
    """And each GPU's peak is the allocator's, and within its own budget."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8 if CARDS else 16}
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes)
    one, both = Engine(folder, device="cuda"), Engine(folder, device=BOTH)
    whole = one.plan(48, 4, sparsity=0)
    per_layer = whole.layers[0].full_bytes
    one.budget = both.budget = budget = whole.peak - len(whole.layers) // 4 * per_layer
    assert one.plan(48, 4).prunes or one.plan(48, 4).precision.quantized
    report = both.generate(tiny_prompt(), sparsity=0, max_new_tokens=4).report
    assert not report.plan.prunes
    for card, peak in zip(report.plan.cards, report.measured_on_each, strict=True):
        assert card.end > card.begin
        assert (card.end - card.begin) * per_layer < peak <= card.peak
        assert card.peak <= budget
