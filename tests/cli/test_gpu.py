"""Every command where the default device is the GPU, held against the same command on the CPU.

Skipped without CUDA. GRIFFIN_TEST_DEVICE=cpu runs the same lines on a machine without a GPU."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from emulator import CARDS
from tiny import text_paragraph, tiny_checkpoint

DEVICE = os.environ.get("GRIFFIN_TEST_DEVICE", "cuda")
ON_CPU = ("--device", "cpu")
ANSWER = ("--max-new-tokens", "6", "--greedy")
HALF = ("--sparsity", "0.5")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of ten layers, some of which may be skipped."""
    more = {"num_hidden_layers": 10, "max_position_embeddings": 2048}
    return tiny_checkpoint(tmp_path_factory.mktemp("gpu") / "llama", "llama", chat=True, **more)


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    (tmp_path / "alice.txt").write_text(text_paragraph() * 4)
    return tmp_path / "alice.txt"


def done(run: Run, *arguments: object, stdin: str | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(run: Run, *arguments: object) -> dict[str, Any]:
    return dict(json.loads(done(run, *arguments, "--json")))


def answers(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("options", [(), HALF, ("--resident-dtype", "int8"), (*HALF, "--rest", "int4")], ids=str)
def test_generate(run: Run, model: Path, options: tuple[str, ...]) -> None:
    command = ("generate", "--model", model, "--prompt", "Hello", *ANSWER, *options)
    there, here = facts(run, *command), facts(run, *command, *ON_CPU)
    assert (there["device"], here["device"]) == (DEVICE, "cpu")
    assert len(there["token_ids"]) == 6
    if "int" not in "".join(options):  # formats are rounded by other kernels
        assert there["token_ids"] == here["token_ids"]
    last = facts(run, "mem-report", "--last")
    assert last["memory"]["measured_peak_bytes"] == here["memory"]["measured_peak_bytes"]


@pytest.mark.parametrize("options", [(), ("--batch-size", "2"), ("--batch-size", "2", "--per-prompt")], ids=str)
def test_generate_many(run: Run, model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    rows = ["Alice was tired", "Down the rabbit hole she fell", "Orange"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    command = ("generate", "--model", model, "--input", tmp_path / "in.jsonl", *ANSWER, *HALF, *options)
    done(run, *command, "--output", tmp_path / "there.jsonl")
    done(run, *command, "--output", tmp_path / "here.jsonl", *ON_CPU)
    assert answers(tmp_path / "there.jsonl") == answers(tmp_path / "here.jsonl")
    assert all(answers(tmp_path / "there.jsonl"))


def test_chat(run: Run, model: Path) -> None:
    command = ("chat", "--model", model, *ANSWER, *HALF)
    there = done(run, *command, stdin="one\ntwo")
    assert there.strip()
    assert there == done(run, *command, *ON_CPU, stdin="one\ntwo")


def test_export_to_safetensors(run: Run, model: Path, tmp_path: Path) -> None:
    command = ("export-pruned", "--model", model, "--prompt", "Hello", *HALF)
    done(run, *command, "--out", tmp_path / "there")
    done(run, *command, "--out", tmp_path / "here", *ON_CPU)
    there, here = tensors(tmp_path / "there"), tensors(tmp_path / "here")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_export_to_gguf(run: Run, model: Path, tmp_path: Path) -> None:
    command = ("export-pruned", "--model", model, "--prompt", "Hello", "--format", "gguf", *HALF)
    done(run, *command, "--out", tmp_path / "there.gguf")
    done(run, *command, "--out", tmp_path / "here.gguf", *ON_CPU)
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()


def test_export_with_calibration(run: Run, model: Path, alice: Path, tmp_path: Path) -> None:
    sizes = ("--calibration", alice, "--samples", 4, "--tokens", 24)
    command = ("export-pruned", "--model", model, *sizes, *HALF, "--prior-out")
    done(run, *command, tmp_path / "prior", "--out", tmp_path / "there")
    done(run, *command, tmp_path / "prior-2", "--out", tmp_path / "here", *ON_CPU)
    there, here = tensors(tmp_path / "there"), tensors(tmp_path / "here")
    assert {name: t.shape for name, t in there.items()} == {name: t.shape for name, t in here.items()}
    prompt = ("--prompt", "Hello", *ANSWER, *HALF)
    assert facts(run, "generate", "--model", model, *prompt, "--prior", tmp_path / "prior")["device"] == DEVICE


def test_calibrate(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--prompt-tokens", 12, "--continue-tokens", 8, "--windows", 2)
    found = []
    for cache, options in (("there", ()), ("here", ON_CPU)):
        monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / cache))
        found.append(facts(run, "calibrate", "--model", model, *sizes, *options)["kl"])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-2, atol=1e-4)


def test_eval_perplexity(run: Run, model: Path, alice: Path) -> None:
    sizes = ("--data", alice, "--prompt-tokens", 24, "--continue-tokens", 16, "--windows", 2)
    command = ("eval", "perplexity", "--model", model, *sizes)
    there, here = facts(run, *command), facts(run, *command, *ON_CPU)
    found = [[row["perplexity"] for row in each["results"]] for each in (there, here)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_eval_compare_and_its_figure(run: Run, ten: Path, alice: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, sizes = tmp_path / "out.jsonl", ("--windows", 1, "--problems", 2, "--samples", 4, "--tokens", 60)
    done(run, "eval", "compare", "--model", ten, "--text", alice, *sizes, "--share", 0.5, "--out", out)
    done(run, "plot", "compare", "--results", out, "--out", tmp_path / "compare.svg")
    assert (tmp_path / "compare.svg").stat().st_size > 1000


def test_plot(run: Run, model: Path, alice: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ("plot", "jaccard", "--model", model, "--data", alice, "--windows", 2, "--prompt-tokens", 24)
    done(run, *command, "--out", tmp_path / "jaccard.svg")
    assert (tmp_path / "jaccard.svg").stat().st_size > 1000


def test_mem_report(run: Run, model: Path) -> None:
    assert facts(run, "mem-report")["machine"]["device"] == DEVICE
    tokens = ("--prompt-tokens", 32, "--max-new-tokens", 8)
    assert facts(run, "mem-report", "--model", model, *tokens)["device"] == DEVICE


@pytest.mark.skipif(CARDS > 0, reason="accelerate numbers devices, as torch alone does; and it takes 20 s there")
def test_bench(run: Run, model: Path) -> None:
    sizes = ("--lengths", "8+4", "--repeats", 1, "--warm", "--device-memory", "2GiB")
    names = ["full", "accelerate", "griffin"]
    methods = ("--methods", ",".join(names))
    lines = [json.loads(line) for line in done(run, "bench", "--model", model, *sizes, *methods, "--json").splitlines()]
    assert lines[0]["device"] == DEVICE
    rows = [line for line in lines if line["kind"] == "row"]
    assert [row["error"] for row in rows] == [None] * len(names)
    assert all(row["tokens_per_s"] > 0 and row["of_limit"] > 0 for row in rows)
    assert (rows[-1]["prompt_again_s"] is not None) == (DEVICE != "cpu")
