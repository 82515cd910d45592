"""The curves against a slow measurement by hand, the forked cache against whole sequences, and the command."""

import hashlib
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli import calibrate as command
from tiny import BOS_ID, text_paragraph, tiny_checkpoint, tiny_prompt
from transformers import PreTrainedModel

from griffin_offload import Engine
from griffin_offload.checkpoint.key import checkpoint_key
from griffin_offload.errors import BudgetError, GriffinError, OptionError, PromptError
from griffin_offload.evaluation import calibrate
from griffin_offload.evaluation.figures import observe
from griffin_offload.evaluation.scoring.prompt_cache import forked_cache, prompt_cache
from griffin_offload.evaluation.scoring.reads import fits
from griffin_offload.evaluation.scoring.scored import Pair
from griffin_offload.evaluation.scoring.variant import ScoredRow
from griffin_offload.options import FfnSkip
from griffin_offload.paths import cache_folder
from griffin_offload.pruning.layer_allocation import Curves, calibration_path, load_curves
from griffin_offload.pruning.shipped_text import shipped_samples, shipped_text_hash

P, C = 40, 12  # the windows of sliding attention hold 16
SMALL = ["--prompt-tokens", "20", "--continue-tokens", "4", "--windows", "1", "--dtype", "float32"]
# Sliding attention and full, a fused bias, (in, out) weights, learned positions, routed experts.
KINDS = ["llama", "gemma3_text", "opt", "gpt2", "mixtral"]


def text() -> str:
    return text_paragraph(120)


def slow_curves(folder: Path, windows: list[list[int]], prompt: int) -> list[list[float]]:
    """One layer and one share at a time, on the whole model in memory."""
    model = oracle.load(folder)
    layers = len(oracle.blocks(model))
    kl = [[0.0] * len(calibrate.SHARES) for _ in range(layers)]
    for ids in windows:
        before, after = ids[:prompt], [*ids[prompt:], BOS_ID]  # the last one is never read
        full = oracle.continuation_logits(model, before, after, None)[1:-1].log_softmax(-1)
        half = oracle.experts(model, before, 0.5)
        for column, share in enumerate(calibrate.SHARES):
            chosen = oracle.experts(model, before, 1 - share)
            for layer in range(layers):
                experts = [*half[:layer], chosen[layer], *half[layer + 1 :]]
                ours = oracle.continuation_logits(model, before, after, experts)[1:-1].log_softmax(-1)
                divergence = torch.nn.functional.kl_div(ours, full, log_target=True, reduction="none").sum(-1).mean()
                kl[layer][column] += divergence.item() / len(windows)
    return kl


def measure(folder: Path, **options: Any) -> Curves:
    sizes: dict[str, Any] = {"prompt_tokens": P, "continue_tokens": C, "windows": 2, **options}
    return calibrate.measure(Engine(folder, device_memory="4GiB", dtype="float32"), text(), **sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_curves_are_the_slow_ones(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / kind, kind)
    curves = measure(folder)
    windows = observe.cut_prompts(Engine(folder), text(), 2, P + C)
    slow = slow_curves(folder, windows, P)
    assert (curves.shares, curves.others) == ((0.25, 0.5, 1.0), 0.5)
    torch.testing.assert_close(torch.tensor(curves.kl), torch.tensor(slow), rtol=1e-3, atol=2e-6)
    assert min(abs(row[0] - row[2]) for row in slow) > 1e-3  # so that the comparison tells something


def test_windows_are_spread_and_begin_as_a_text_does(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "model", "llama"))
    ids = engine.tokenizer(text(), add_special_tokens=False)["input_ids"]
    third = len(ids) // 3
    expected = [[BOS_ID, *ids[start : start + 19]] for start in (0, third, 2 * third)]
    assert observe.cut_prompts(engine, text(), 3, 20) == expected


def test_many_sweeps_of_few_rows_measure_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    told: list[tuple[int, int]] = []
    once = measure(folder, on_progress=lambda *at: told.append(at))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr("griffin_offload.planning.scoring.LOGITS", 3 * C * 300 * 4)  # 3 rows a forward
    monkeypatch.setattr(calibrate, "fits", lambda engine, pairs, rows: len(rows) <= 3)
    told.clear()
    often = measure(folder, on_progress=lambda *at: told.append(at))
    torch.testing.assert_close(torch.tensor(often.kl), torch.tensor(once.kl), rtol=1e-4, atol=1e-6)
    assert told[-1] == (12, 12)  # 7 rows, by 2: 4 sweeps of 3 layers
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_few_rows_fit_where_many_do_not(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    pairs: list[Pair] = [(tiny_prompt(P), tiny_prompt(C))]
    engine = Engine(folder, device_memory="4GiB")
    row = ScoredRow(kept=tuple(layer.whole for layer in engine.skeleton.layers))
    room = [count for count in (1, 10, 1_000_000) if fits(engine, pairs, [ScoredRow()] + [row] * count)]
    assert room == [1, 10]


def test_the_file_says_what_was_measured(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    engine = Engine(folder)
    curves = calibrate.measure(engine, text(), prompt_tokens=P, continue_tokens=C, windows=1)
    assert (curves.key, curves.dtype) == (checkpoint_key(engine.checkpoint), "bfloat16")
    assert (curves.prompt_tokens, curves.continue_tokens, curves.windows) == (P, C, 1)
    assert curves.text_sha256 == hashlib.sha256(text().encode()).hexdigest()


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    with pytest.raises(PromptError, match="3 windows of 199 need 597"):
        measure(folder, prompt_tokens=100, continue_tokens=100, windows=3)
    with pytest.raises(PromptError, match="reads at most 256"):
        measure(folder, prompt_tokens=250, continue_tokens=10, windows=1)
    with pytest.raises(OptionError, match="at least 1"):
        measure(folder, windows=0)
    with pytest.raises(OptionError, match="2 tokens"):
        measure(folder, continue_tokens=1)
    with pytest.raises(OptionError, match="more than keys and values"):
        measure(tiny_checkpoint(tmp_path / "hybrid", "falcon_h1"))
    with pytest.raises(BudgetError):
        calibrate.measure(Engine(folder, device_memory="20MiB"), text(), prompt_tokens=P, continue_tokens=C, windows=2)


# The forked cache


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_a_forked_cache_continues_its_prompt(kind: str, tmp_path: Path) -> None:
    """Two different continuations of one prompt, against each as a whole sequence."""
    model = oracle.load(tiny_checkpoint(tmp_path / kind, kind))
    prompt, one, two = tiny_prompt(P), tiny_prompt(C, seed=1), tiny_prompt(C, seed=2)
    before = prompt_cache()
    after = forked_cache(before, P, model.config.num_hidden_layers)  # made before the prompt is read, as in lock-step
    assert after.get_seq_length() == P
    model(torch.tensor([prompt]), past_key_values=before, use_cache=True)
    logits = model(torch.tensor([one, two]), past_key_values=after, use_cache=True).logits
    for ours, ids in zip(logits, (one, two), strict=True):
        whole = whole_sequence(model, prompt + ids)
        torch.testing.assert_close(ours, whole[P:], rtol=1e-4, atol=1e-4)
    again = forked_cache(before, P, model.config.num_hidden_layers)  # the first one left the prompt's cache as it was
    repeated = model(torch.tensor([one, two]), past_key_values=again, use_cache=True).logits
    assert torch.equal(repeated, logits)


def whole_sequence(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command.command, [*arguments])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))  # every test's tiny model has the same key
    return str(tiny_checkpoint(tmp_path / "model", "llama"))


def test_the_command_measures_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SHOWN", 2)
    result = run("--model", model, *SMALL)
    assert result.exit_code == 0, result.output
    path = calibration_path(cache_folder(), checkpoint_key(Engine(model).checkpoint))
    curves = load_curves(path)
    assert curves is not None
    assert str(path) in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    worst = max(range(3), key=lambda layer: curves.weights[layer])
    assert [f"{worst}", f"{curves.weights[worst]:.2f}"] in [line[:2] for line in lines]
    written = path.stat().st_mtime_ns
    assert run("--model", model, *SMALL).stdout == result.stdout
    assert path.stat().st_mtime_ns == written  # as it was measured before
    assert run("--model", model, *SMALL, "--force").exit_code == 0
    assert path.stat().st_mtime_ns > written


def test_the_command_in_json(model: str) -> None:
    facts = json.loads(run("--model", model, *SMALL, "--json").stdout)
    path = Path(facts.pop("path"))
    assert facts == json.loads(path.read_text())
    assert len(facts["kl"]) == 3


def test_curves_measured_otherwise_are_not_replaced_unasked(model: str, tmp_path: Path) -> None:
    data = tmp_path / "own.txt"
    data.write_text(text())
    assert run("--model", model, *SMALL).exit_code == 0
    refused = run("--model", model, *SMALL, "--data", str(data))
    assert isinstance(refused.exception, OptionError)
    assert "--force" in str(refused.exception)
    assert run("--model", model, *SMALL, "--data", str(data), "--force").exit_code == 0


def test_a_calibrated_model_shares_the_same_total(model: str, tmp_path: Path) -> None:
    engine = Engine(model)
    half = {"sparsity": 0.5, "rest": "drop"}
    uniform = engine.plan(20, 4, **half)
    assert engine.plan(20, 4, **half, allocation="sensitivity").kept == uniform.kept  # no calibration: as without
    assert not uniform.calibrated
    assert run("--model", model, *SMALL).exit_code == 0
    shared = engine.plan(20, 4, **half, allocation="sensitivity")
    assert shared.kept != uniform.kept
    assert sum(k for (k,) in shared.kept) == sum(k for (k,) in uniform.kept)
    assert shared.resident_bytes == uniform.resident_bytes
    for of_it in ({}, {"allocation": "sensitivity"}):  # used from now on, unless somebody says otherwise
        report = engine.generate(tiny_prompt(20), **half, **of_it, max_new_tokens=4).report
        assert report.plan.kept == shared.kept
        assert "sparsity 0.5 (by layer, as calibrated)" in dict(report.rows())["resident"]
        assert report.to_json()["calibrated"] is True
    assert engine.plan(20, 4, **half, allocation="uniform").kept == uniform.kept
    assert engine.plan(20, 4, sparsity=0.5, method="griffin").kept == uniform.kept
    assert engine.plan(20, 4, skip=FfnSkip(0.5, "prompt", (0, 0)), **half).calibrated is False
    engine.export(tiny_prompt(), tmp_path / "out", prompt_text="x", sparsity=0.5)
    assert json.loads((tmp_path / "out" / "griffin.json").read_text())["kept"] == uniform.kept[0][0]
    calibration_path(cache_folder(), checkpoint_key(engine.checkpoint)).write_text("no calibration")
    assert engine.plan(20, 4, **half).kept == uniform.kept
    with pytest.raises(GriffinError, match="is not a calibration"):
        engine.plan(20, 4, **half, allocation="sensitivity")


def test_without_a_text_the_one_that_ships_is_taken(tmp_path: Path) -> None:
    """The end of every exchange and passage; fewer windows are spread over them."""
    engine = Engine(tiny_checkpoint(tmp_path / "model", "llama"), device_memory="4GiB", dtype="float32")
    samples = shipped_samples(engine.tokenizer, False)
    curves = calibrate.measure(engine, prompt_tokens=P, continue_tokens=C, windows=2)
    slow = slow_curves(engine.path, [samples[number][-P - C :] for number in (0, len(samples) // 2)], P)
    torch.testing.assert_close(torch.tensor(curves.kl), torch.tensor(slow), rtol=1e-3, atol=2e-6)
    assert curves.text_sha256 == shipped_text_hash()
    with pytest.raises(PromptError, match=f"has {len(samples)} windows"):
        calibrate.measure(engine, windows=len(samples) + 1)


@pytest.mark.real
def test_the_shipped_text_is_long_enough(smol: Path) -> None:
    samples = shipped_samples(Engine(smol).tokenizer, True)
    assert len(samples) == calibrate.WINDOWS
    assert min(map(len, samples)) > 4 * calibrate.CONTINUE_TOKENS
