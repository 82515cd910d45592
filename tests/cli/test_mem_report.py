"""`griffin mem-report`: of a model, of the last run, of this machine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from card import Card, install
from command_line import ANSWER, KEYS, Run, failed
from tiny import tiny_checkpoint

from griffin_offload.memory import cuda
from griffin_offload.sources import hub
from griffin_offload.sources.resolve import CATALOGUE, CatalogueModel
from griffin_offload.units import GIB, MIB, parse_bytes


def test_mem_report_of_a_model(run: Run, model: Path) -> None:
    options = ("--sparsity", "0.5", "--prompt-tokens", "20", "--max-new-tokens", "10")
    facts = json.loads(run("mem-report", "--model", model, *options, "--json").stdout)
    assert (facts["prompt_tokens"], facts["max_new_tokens"], facts["sparsity"]) == (20, 10, 0.5)
    assert [layer["kept"] for layer in facts["layers"]] == [48, 48, 48]
    screen = run("mem-report", "--model", model, *options).stdout
    for row in facts["rows"]:
        assert row["name"] in screen
    assert len(re.findall(r"^ +[012] +48 +96 ", screen, re.MULTILINE)) == 3, "layer by layer"
    assert "to spare" in screen


def test_mem_report_of_a_model_that_does_not_fit_says_what_would(run: Run, model: Path) -> None:
    common = ("mem-report", "--model", model, "--prompt-tokens", "20")
    result = run(*common, "--device-memory", "10MB")
    failed(result, 1, "the budget is 9.54 MiB")
    smallest = re.search(r"--device-memory (\w+)", result.stderr)
    assert smallest
    enough = parse_bytes(smallest[1]) + 32 * MIB  # this process has grown a little since it was measured
    assert run(*common, "--device-memory", enough).exit_code == 0


def test_mem_report_of_the_last_run(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path))
    failed(run("mem-report", "--last"), 1, "no run")
    facts = json.loads(
        run("generate", "--model", model, "--prompt", "Hi", "--sparsity", "0.5", *ANSWER, "--json").stdout
    )
    last = json.loads(run("mem-report", "--last", "--json").stdout)
    assert {key: last[key] for key in KEYS} == {key: facts[key] for key in KEYS}
    assert "text" not in last, "what was asked and answered is nobody's business"
    screen = run("mem-report", "--last").stdout
    assert f"{model} at 50% sparsity, float32 on cpu" in screen
    assert "predicted" in screen
    assert "of the prediction" in screen
    (tmp_path / "last.json").write_text("{}")
    failed(run("mem-report", "--last"), 1, "another version")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    install([Card(), Card()], monkeypatch)
    yield
    cuda.context.cache_clear()


@pytest.mark.usefixtures("two_cards")
def test_mem_report_of_a_model_over_two_cards(run: Run) -> None:
    common = ("mem-report", "--model", "llama-2-13b", "--sparsity", 0)
    common = (*common, "--prompt-tokens", 512, "--device", "cuda:0,cuda:1")
    facts = json.loads(run(*common, "--device-memory", "16GiB", "--json").stdout)
    assert facts["device"] == "cuda:0, cuda:1"
    first, second = facts["cards"]
    assert (first["device"], second["device"]) == ("cuda:0", "cuda:1")
    assert (first["layers"][0], first["layers"][1], second["layers"][1]) == (0, second["layers"][0], 40)
    assert first["planned_peak_bytes"] + second["planned_peak_bytes"] == facts["peak_bytes"] > 24 * GIB
    screen = " ".join(run(*common, "--device-memory", "16GiB").stdout.split())
    assert f"cuda:0, layers 0 to {first['layers'][1] - 1}" in screen
    assert f"cuda:1, layers {first['layers'][1]} to 39" in screen
    result = run(*common, "--device-memory", "12GiB")
    failed(result, 1, "on cuda:1 (512 + 256 tokens); the budget is 12.00 GiB there. It fits with --sparsity 0.")
    failed(run(*common[:-1], "cuda:1"), 1, "set CUDA_VISIBLE_DEVICES=1 and give cuda")


@pytest.mark.usefixtures("two_cards")
def test_a_benchmark_is_of_one_device(run: Run) -> None:
    failed(run("bench", "--synthetic", "llama-2-7b", "--device", "all"), 1, "all is several devices, and this runs on")


def test_mem_report_of_a_model_that_is_only_known_by_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its shape; nothing is fetched."""
    monkeypatch.setattr(hub, "fetch", lambda *args, **kwargs: pytest.fail("fetched"))
    facts = json.loads(run("mem-report", "--model", "llama-2-13b", "--device-memory", "8GiB", "--json").stdout)
    assert (facts["model"], facts["model_path"], facts["dtype"]) == ("llama-2-13b", None, "bfloat16")
    assert len(facts["layers"]) == 40
    assert facts["full_bytes"] > 24 * 2**30
    assert any(rung["taken"] and rung["fits"] for rung in facts["ladder"])
    screen = run("mem-report", "--model", "meta-llama/Llama-2-13b-hf", "--device-memory", "8GiB").stdout
    assert screen.startswith("llama-2-13b is not on this machine: planned from its shape. `griffin pull llama-2-13b`")
    assert "fetches meta-llama/Llama-2-13b-hf, 24.24 GiB in bfloat16 (licence: Llama 2 Community, gated" in screen
    half = run("mem-report", "--model", "llama-2-13b", "--device-memory", "8GiB", "--sparsity", "0.1", "--rest", "drop")
    failed(half, 1, "llama-2-13b at sparsity 0.1 needs")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5_text", "mixtral", "gpt2"])
def test_a_plan_from_a_shape_is_that_of_the_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text())
    known = CatalogueModel("known", "owner/known", "MIT", False, 1, config)
    monkeypatch.setitem(CATALOGUE, "known", known)
    common = ("--dtype", "float32", "--prompt-tokens", "20", "--max-new-tokens", "10", "--json")
    found = [
        json.loads(run("mem-report", "--model", name, *options, *common).stdout)
        for options in ([], ["--sparsity", "0.5"])
        for name in ("known", folder)
    ]
    for known_plan, plan in zip(found[::2], found[1::2], strict=True):
        for key in ("resident_bytes", "full_bytes", "layers", "precision", "sparsity"):
            assert known_plan[key] == plan[key], key


def test_mem_report_of_this_machine(run: Run) -> None:
    facts = json.loads(run("mem-report", "--device-memory", "24GiB", "--json").stdout)
    assert facts["machine"]["budget"] == 24 * 2**30
    assert facts["machine"]["ram_total"] > facts["machine"]["ram_available"] > 0
    assert facts["machine"]["disk_read_bandwidth"] > 0
    models = {row["alias"]: row for row in facts["models"]}
    big = models["llama-2-13b"]
    assert big["full_bytes"] > 24 * 2**30 > big["resident_50"] > big["resident_75"]
    assert big["best"].startswith("bfloat16, 50% in int8")
    assert big["resident_50"] < big["best_bytes"] < 24 * 2**30
    assert models["smollm2-135m"]["best"] == "bfloat16"
    screen = run("mem-report", "--device-memory", "24GiB").stdout
    assert "24.00 GiB" in screen
    for name in ("RAM", "GPU", "disk", "llama-2-13b", "smollm2-135m"):
        assert name in screen


def test_every_format_has_a_name_and_a_context_bounds_the_cache(run: Run, model: Path) -> None:
    facts = json.loads(run("mem-report", "--model", "llama-2-13b", "--device-memory", "9GiB", "--json").stdout)
    assert facts["precision"] == {"experts": "int4", "others": "int4", "head": "int8", "rest": None}
    bounded = ("--context", "100", "--prompt-tokens", "90", "--max-new-tokens", "50", "--json")
    for name in ("llama-2-13b", model):
        facts = json.loads(run("mem-report", "--model", name, *bounded).stdout)
        assert facts["max_new_tokens"] == 10
    assert facts["precision"] == {"experts": "float32", "others": "float32", "head": "float32", "rest": None}
    failed(run("mem-report", "--model", "llama-2-13b", "--context", "5000"), 1, "reads at most 4096 tokens")
    failed(run("mem-report", "--context", "50"), 2, "--context needs --model NAME")


def test_models_by_a_word(run: Run) -> None:
    names = [row["name"] for row in json.loads(run("models", "llama-2-13", "--json").stdout)]
    assert names == ["llama-2-13b", "llama-2-13b-chat"]
    failed(run("models", "nonsense"), 1, "'nonsense'")
