"""The fold against a dense reference: ridge regression in its primal form, float64, on the whole model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Case
from engines import Logits, copying
from rounding import ROUNDED
from tiny import tiny_checkpoint, tiny_prompt
from tiny_gguf import write_gguf
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.evaluation.scoring.variant import Variant, all_variants
from griffin_offload.model import modules
from griffin_offload.offload.gather import take_over
from griffin_offload.options import FfnSkip, Pruning
from griffin_offload.pruning import fold
from griffin_offload.pruning.calibration import Calibration

TOKENS = 5
# One of each layout: fused, transposed, with biases, routed, interleaved, shared experts, layers of several kinds.
LAYOUTS = ["llama", "phi3", "gpt2", "opt", "mixtral", "gpt_oss", "granitemoeshared", "nemotron_h"]


def answer(engine: Engine, prompt: list[int], **how: Any) -> tuple[list[int], Tensor]:
    logits = Logits()
    how = {"sparsity": 0.5, "rest": "drop", "prior": "off", "fold": True, "fold_strength": 0.3, **how}
    made = engine.generate(prompt, max_new_tokens=TOKENS, do_sample=False, logits_processor=[logits], **how)
    return made.token_ids, torch.stack(logits.steps)


def solve(z: Tensor, down: Tensor, chosen: Tensor, strength: float) -> Tensor:
    """The folded down matrix (D, F), the dropped columns as they were: the obvious way."""
    dropped = torch.ones(z.shape[1], dtype=torch.bool)
    dropped[chosen] = False
    kept, lost = z[:, chosen], z[:, dropped] @ down[:, dropped].T
    ridge = strength * (kept @ kept.T).diagonal().mean() * torch.eye(len(chosen), dtype=z.dtype)
    folded = down.clone()
    folded[:, chosen] += torch.linalg.solve(kept.T @ kept + ridge, kept.T @ lost).T
    return folded


@torch.no_grad()
def folded_model(case: Case, engine: Engine, prompts: list[list[int]], kept: Any, strength: float = 0.3) -> Any:
    """A copy of the whole model with the down columns of the kept neurons folded."""
    model = copy.deepcopy(case.model)
    rows = [of_blocks(case.model, prompt) for prompt in prompts]
    blocks = [(layer, block) for layer in engine.skeleton.layers for block in layer.blocks]
    paths = {(b.layer, b.name): i for i, b in enumerate(oracle.blocks(model))}
    for layer, block in blocks:
        number = paths[engine.skeleton.layers.index(layer), block.path]
        parameter, axis = model.get_parameter(layer.prefix + block.down).data, block.rows[block.down].axis
        matrices = list(parameter) if block.routed else [parameter]
        for expert, matrix in enumerate(matrices):
            z = torch.cat([of_prompt[number][expert] for of_prompt in rows]).double()
            chosen = kept[number][expert] if block.routed else kept[number]
            down = (matrix if axis else matrix.T).double()
            if len(z):
                down = solve(z, down, chosen, strength)
            (matrix if axis else matrix.T).copy_(down)
    return model


def of_blocks(model: Any, prompt: list[int]) -> list[list[Tensor]]:
    """By block and expert: rows of Z, the first token's and the last ones' left out."""
    counted = prompt[: len(prompt) - fold.held_out(len(prompt))]
    first, every = oracle.activations(model, prompt[:1]), oracle.activations(model, counted)
    each = [(f, z) if isinstance(z, list) else ([f], [z]) for f, z in zip(first, every, strict=True)]
    return [[rows[len(one) :] for one, rows in zip(f, z, strict=True)] for f, z in each]


@torch.no_grad()
def expected(case: Case, engine: Engine, prompt: list[int], ids: list[int], strength: float = 0.3) -> Tensor:
    """Logits (N, V) of the tokens `ids`: the prompt by the whole model, the others by the folded one."""
    kept = case.kept(prompt, 0.5)
    model = folded_model(case, engine, [prompt], kept, strength)
    return continued(case, model, kept, prompt, ids)


def continued(case: Case, model: Any, kept: Any, prompt: list[int], ids: list[int]) -> Tensor:
    first, cache = oracle._forward(case.model, prompt, None)
    found = [first[-1]]
    with oracle._masked(model, kept):
        for token in ids[:-1]:
            logits, cache = oracle._forward(model, [token], cache)
            found.append(logits[-1])
    return torch.stack(found)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((ours - theirs).abs().max() < tolerance * theirs.abs().max())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_is_the_dense_reference(case: Callable[[str], Case], kind: str) -> None:
    engine, prompt = Engine(case(kind).folder, dtype="float32"), tiny_prompt()
    ids, ours = answer(engine, prompt)
    assert close(ours, expected(case(kind), engine, prompt, ids))
    assert not close(ours, continued(case(kind), case(kind).model, case(kind).kept(prompt, 0.5), prompt, ids))


def test_the_pruned_block_comes_closer_to_the_whole_one(case: Callable[[str], Case]) -> None:
    """On the prompt itself, where the regression was made."""
    llama, prompt = case("llama"), tiny_prompt()
    kept = llama.kept(prompt, 0.5)
    folded = folded_model(llama, Engine(llama.folder), [prompt], kept)
    for number, (z, chosen) in enumerate(zip(oracle.activations(llama.model, prompt), kept, strict=True)):
        whole = oracle.down_projections(llama.model)[number].weight
        target = z[1:] @ whole.T
        error = [
            (z[1:, chosen] @ matrix[:, chosen].T - target).norm()
            for matrix in (oracle.down_projections(folded)[number].weight, whole)
        ]
        assert error[0] < 0.8 * error[1]


def test_a_strong_ridge_is_the_unfolded_model(case: Callable[[str], Case]) -> None:
    engine, prompt = Engine(case("llama").folder), tiny_prompt()
    _, strong = answer(engine, prompt, fold_strength=1e9)
    assert close(strong, case("llama").answer(prompt, 0.5, TOKENS)[1], 1e-5)
    assert not close(answer(engine, prompt)[1], strong)


def test_where_nothing_is_dropped_nothing_changes(case: Callable[[str], Case]) -> None:
    engine, prompt = Engine(case("llama").folder), tiny_prompt()
    for how in ({"sparsity": 0.0}, {"rest": "int8"}):
        folded, plain = (
            engine.generate(prompt, fold=on, max_new_tokens=2, **{"sparsity": 0.5, "rest": "drop", **how})
            for on in (1, 0)
        )
        assert folded.token_ids == plain.token_ids
        assert folded.report.plan.fold is None
        assert folded.report.plan.peak == plain.report.plan.peak
    assert engine.generate(prompt, fold=True, sparsity=1.0, rest="drop", max_new_tokens=2).token_ids
    assert engine.generate(prompt[:1], fold=True, sparsity=0.5, rest="drop", max_new_tokens=2).token_ids


def test_the_first_answer_is_the_second_and_an_unfolded_one_between(case: Callable[[str], Case]) -> None:
    """What is read again, or held in RAM, is not what was folded."""
    prompt = tiny_prompt()
    for engine in (Engine(case("llama").folder, host_memory="1GiB"), copying(case("llama").folder)):
        first, between, last = (answer(engine, prompt, fold=on)[1] for on in (True, False, True))
        assert torch.equal(first, last)
        assert close(between, case("llama").answer(prompt, 0.5, TOKENS)[1], 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("resident_dtype", ["int8", "int4"])
def test_it_is_folded_before_it_is_quantized(case: Callable[[str], Case], kind: str, resident_dtype: str) -> None:
    engine, prompt = Engine(case(kind).folder, dtype="float32"), tiny_prompt()
    answer(engine, prompt, resident_dtype=resident_dtype)
    kept = case(kind).kept(prompt, 0.5)
    model, layer = folded_model(case(kind), engine, [prompt], kept), engine.skeleton.layers[0]
    block = layer.blocks[0]
    weights: Any = engine.resident.layers[0].tensors[block.down]
    whole, folded = (of.get_parameter(layer.prefix + block.down).data for of in (case(kind).model, model))
    for expert, weight in enumerate(weights if block.routed else [weights]):
        chosen = kept[0][expert] if block.routed else kept[0]
        ours = weight.linear(torch.eye(len(chosen))).T
        plain, theirs = (matrix[expert] if block.routed else matrix for matrix in (whole, folded))
        if not block.rows[block.down].axis:
            plain, theirs = plain.T, theirs.T
        wanted = ROUNDED[resident_dtype](theirs[:, chosen].contiguous())
        # A weight in the middle between two levels may fall to either side.
        assert (ours - wanted).norm() < 0.02 * wanted.norm()
        assert (ours - plain[:, chosen]).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_batch_folds_the_tokens_of_all_prompts(case: Callable[[str], Case], kind: str) -> None:
    """One prompt is padded; padding and first tokens leave no trace."""
    engine, prompts = Engine(case(kind).folder), [tiny_prompt(20), tiny_prompt(33, 1)]
    logits = Logits()
    made = engine.generate_batch(
        prompts,
        sparsity=0.5,
        rest="drop",
        fold=True,
        fold_strength=0.3,
        max_new_tokens=2,
        do_sample=False,
        logits_processor=[logits],
    )
    kept = [chosen for layer in engine.kept_neurons() for chosen in layer]
    model = folded_model(case(kind), engine, prompts, kept)
    theirs = continued(case(kind), model, kept, prompts[0], made[0].token_ids)
    assert close(logits.steps[1], theirs[1])


def test_a_set_for_each_prompt_is_each_prompt_alone(case: Callable[[str], Case]) -> None:
    engine, prompts = Engine(case("llama").folder), [tiny_prompt(20), tiny_prompt(33, 1)]
    how: dict[str, Any] = {
        "sparsity": 0.5,
        "rest": "drop",
        "fold_strength": 0.1,
        "max_new_tokens": 8,
        "do_sample": False,
    }
    alone = [engine.generate(prompt, **how).token_ids for prompt in prompts]
    both = engine.generate_batch(prompts, per_prompt=True, **how)
    assert [one.token_ids for one in both] == alone


def test_a_prompt_in_chunks(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt = Engine(case("mixtral").folder), tiny_prompt(80)
    _, whole = answer(engine, prompt)
    monkeypatch.setattr(modules, "PIECE", 16)
    assert close(answer(engine, prompt)[1], whole, 1e-4)


def test_a_long_prompt_is_thinned_out(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "TOKENS", 10)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :4] = 0
    tokens = fold.fold_tokens(mask).view(2, 24)
    assert tokens.sum() == 10
    assert not tokens[0, :5].any()
    assert not tokens[1, 0]
    assert not tokens[0, 19:].any()
    assert not tokens[1, 18:].any()
    assert all(len(row.nonzero()) > 2 for row in tokens)
    engine, prompt = Engine(case("llama").folder), tiny_prompt()
    thin = answer(engine, prompt)[1]
    monkeypatch.setattr(fold, "TOKENS", 1024)
    assert not close(thin, answer(engine, prompt)[1])


def test_gguf(case: Callable[[str], Case], tmp_path: Path) -> None:
    file = write_gguf(case("qwen2").folder, tmp_path / "m.gguf")
    engine, prompt = Engine(file, dtype="float32"), tiny_prompt()
    ids, ours = answer(engine, prompt)
    assert close(ours, expected(case("qwen2"), engine, prompt, ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama-relu", "gpt2", "mixtral"])
def test_half_precision_has_no_nan(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    engine, prompt = Engine(tiny_checkpoint(tmp_path / "m", kind, dtype=dtype)), tiny_prompt()
    for strength in (1e-3, 0.3):
        _, ours = answer(engine, prompt, fold_strength=strength)
        assert ours.isfinite().all()
        for layer in engine.resident.layers:
            assert all(tensor.isfinite().all() for tensor in layer.tensors.values())


@pytest.mark.parametrize("size", [0.0, 1e-18, 6e4])
def test_activations_of_any_size(size: float) -> None:
    z = (size * torch.randn(12, 8, dtype=torch.float64).clamp(-1, 1)).to(torch.float16 if size > 1 else torch.float32)
    down, chosen = torch.randn(6, 8, dtype=torch.float64), torch.arange(4)
    reference = solve(z.double() / (size or 1), down, chosen, 0.3) if size else down
    rows = fold.joined([z[:5].clone(), z[5:].clone()])
    ours = down[:, chosen].float()
    take_over(ours, fold.ridge(rows[:, chosen], rows[:, 4:] @ down[:, 4:].to(rows.dtype).T, 0.3))
    torch.testing.assert_close(ours.double(), reference[:, chosen], rtol=0, atol=0.02 if size > 1 else 1e-4)


def test_an_export_carries_it(case: Callable[[str], Case], tmp_path: Path) -> None:
    engine, prompt = Engine(case("llama").folder), tiny_prompt()
    answer(engine, prompt)
    name = "mlp.down_proj.weight"
    folded = [layer.tensors[name].clone() for layer in engine.resident.layers]
    how: dict[str, Any] = {"sparsity": 0.5, "prior": "off", "fold": True, "fold_strength": 0.3, "prompt_text": ""}
    engine.export(prompt, tmp_path / "out", **how)
    model = oracle.load(tmp_path / "out")
    for number, weight in enumerate(folded):
        torch.testing.assert_close(model.model.layers[number].mlp.down_proj.weight.data, weight)
    assert json.loads((tmp_path / "out" / "griffin.json").read_text())["fold"] == 0.3
    assert "took over" in (tmp_path / "out" / "README.md").read_text()
    file = engine.export(prompt, tmp_path / "out.gguf", format="gguf", gguf_type="f32", multiple_of=1, **how).path
    other = Engine(file, dtype="float32")
    other.generate(prompt, sparsity=0.0, max_new_tokens=1)
    for weight, layer in zip(folded, other.resident.layers, strict=True):
        torch.testing.assert_close(layer.tensors[name], weight)


def test_the_method_of_the_paper_is_not_folded() -> None:
    paper = Pruning(0.5, method="griffin")
    assert (paper.folds, paper.rest, paper.selection, paper.allocation) == (None, "drop", "topk", "uniform")
    for name, value in {"fold": True, "rest": "int4", "selection": "random", "allocation": "sensitivity"}.items():
        with pytest.raises(OptionError, match=f"method griffin has {name} .*: leave out {name}, or the method"):
            Pruning(0.5, method="griffin", **{name: value})
    with pytest.raises(OptionError, match="above 0"):
        Pruning(0.5, fold=True, fold_strength=0.0)


def test_it_is_on_unless_somebody_says_otherwise() -> None:
    assert Pruning(0.5).folds == 0.3
    assert Pruning(0.5, fold=False).folds is None
    assert Pruning(0.5, method="griffin").folds is None


def test_a_measurement_folds_what_an_answer_folds() -> None:
    assert Variant(0.5, rest="drop").folds == 0.3
    assert [Variant(0.5, **how).folds for how in ({}, {"rest": "int8"}, {"method": "griffin"})] == [None] * 3
    assert [Variant(0.5, rest="drop", **how).folds for how in ({"static": True}, {"skip": FfnSkip(0.5)})] == [None] * 2
    assert Variant(0.5, rest="drop", prior="off").label() == "50% fold 0.3"
    both = all_variants([0.5], ["topk"], ["uniform"], rests=["drop", "int4"], folds=[0.0, 1.0])
    assert [each.label() for each in both] == ["50% prior", "50% prior fold 1", "50%, rest int4"]


def test_the_report_and_the_plan_say_it(case: Callable[[str], Case]) -> None:
    engine = Engine(case("llama").folder)
    report = engine.generate(tiny_prompt(), sparsity=0.5, rest="drop", max_new_tokens=2).report
    assert "strength 0.3" in dict(report.rows())["fold"]
    assert report.to_json()["fold"] == 0.3
    (row,) = [row for row in report.plan.rows if row.name == "fold"]
    tokens, neurons, hidden = 47, 96, 32
    assert row.bytes > 4 * tokens * (neurons + neurons // 2 + 4 * hidden)


def test_a_budget_without_room_for_it_is_told(case: Callable[[str], Case]) -> None:
    """An answer is worth more; the measurement of the fidelity gives way first."""
    engine, how = Engine(case("llama").folder), {"sparsity": 0.5, "rest": "drop"}
    folded, plain = (engine.plan(200, 2, fold=on, **how) for on in (True, False))
    assert folded.peak > plain.peak
    engine.budget = plain.peak
    report = engine.generate(tiny_prompt(200), max_new_tokens=2, **how).report
    assert (report.plan.fold, report.plan.no_room_to_fold) == (None, True)
    assert dict(report.rows())["fold"] == "none: the budget has no room for it"
    assert report.to_json()["fold"] is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_static_export_is_folded_by_its_samples(case: Callable[[str], Case], tmp_path: Path, kind: str) -> None:
    engine, samples = Engine(case(kind).folder, dtype="float32"), [tiny_prompt(40, 1), tiny_prompt(21, 2)]
    engine.export_static(Calibration(samples), tmp_path / "out", sparsity=0.5)
    facts = json.loads((tmp_path / "out" / "griffin.json").read_text())
    assert facts["fold"] == 0.3
    assert "gave that text" in " ".join((tmp_path / "out" / "README.md").read_text().split())
    kept = [torch.tensor(chosen) for chosen in facts["experts"]]
    reference, small = folded_model(case(kind), engine, samples, kept), oracle.load(tmp_path / "out")
    for number, layer in enumerate(engine.skeleton.layers):
        (block,) = layer.blocks
        name, axis = layer.prefix + block.down, block.rows[block.down].axis
        whole, ours = (model.get_parameter(name).data for model in (reference, small))
        experts = zip(whole, ours, kept[number], strict=True) if block.routed else [(whole, ours, kept[number])]
        for theirs, mine, chosen in experts:
            picked = theirs[:, chosen] if axis else theirs[chosen]
            assert close(mine, picked)


def test_weights_alone_have_nothing_to_fold(case: Callable[[str], Case], tmp_path: Path) -> None:
    Engine(case("llama").folder).export_static(Calibration(score="magnitude"), tmp_path / "out", sparsity=0.5)
    assert "fold" not in json.loads((tmp_path / "out" / "griffin.json").read_text())
