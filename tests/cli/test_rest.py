"""What becomes of the neurons that are not kept: what each command does by default, takes, and says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ANSWER, Run, failed
from tiny import text_paragraph, tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.units import MIB

HALF = ("--sparsity", "0.5")
SIZES = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
FITS, ASKED = "in int4: fits the budget", "dropped: as asked"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of its neurons take 48 MiB, in int4 15 MiB."""
    return tiny_checkpoint(tmp_path_factory.mktemp("rest") / "llama", "llama", dtype=torch.bfloat16, chat=True, **SIZES)


def generated(run: Run, model: Path, *options: object) -> dict[str, Any]:
    result = run("generate", "--model", model, "--prompt", "Hello", *ANSWER, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_generate_keeps_the_rest_in_int4(run: Run, model: Path) -> None:
    facts, dropped = generated(run, model, *HALF), generated(run, model, *HALF, "--rest", "drop")
    assert (facts["rest"], facts["precision"]["rest"]) == ({"taken": "int4", "why": "fits the budget"}, "int4")
    assert (dropped["rest"], dropped["precision"]["rest"]) == ({"taken": "drop", "why": "as asked"}, None)
    assert facts["memory"]["resident_bytes"] > dropped["memory"]["resident_bytes"]
    for same in (("--rest", "auto"), ("--rest", "int4")):
        assert generated(run, model, *HALF, *same)["token_ids"] == facts["token_ids"]
    paper = generated(run, model, *HALF, "--method", "griffin")
    assert paper["token_ids"] not in (facts["token_ids"], dropped["token_ids"])  # dropped neurons are folded
    assert (
        generated(run, model, *HALF, "--rest", "drop", "--no-fold", "--prior", "off")["token_ids"] == paper["token_ids"]
    )
    assert paper["rest"]["taken"] == "drop"
    assert generated(run, model, "--sparsity", "0")["rest"] is None
    assert generated(run, model)["rest"] is None


def test_the_report_says_it(run: Run, model: Path) -> None:
    common = ("generate", "--model", model, "--prompt", "Hello", *ANSWER)
    for options, row in ((HALF, FITS), ((*HALF, "--rest", "drop"), ASKED)):
        assert f"the rest        {row}\n" in run(*common, *options).stderr
    assert "the rest" not in run(*common).stderr


def test_in_a_small_budget_the_rest_is_dropped_and_that_is_said_before_the_answer(
    run: Run, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin_offload.opening.held_memory", lambda device: 400 * MIB)  # of a process like this
    engine = Engine(large)
    kept, dropped = (engine.plan(20, 8, sparsity=0.5, rest=rest).peak for rest in ("int4", "drop"))
    assert kept - dropped > 14 * MIB
    budget = ("--device-memory", (kept + dropped) // 2)
    facts = generated(run, large, *HALF, *budget)
    assert facts["rest"]["taken"] == "drop"
    assert "are needed, the budget is" in facts["rest"]["why"]
    result = run("generate", "--model", large, "--prompt", "Hello", *ANSWER, *HALF, *budget)
    assert result.stderr.startswith("the rest dropped: with it ")
    assert result.stderr.count("dropped: with it ") == 2, "before the answer, and in the report"
    again = run("chat", "--model", large, *ANSWER, *HALF, *budget, stdin="one\n/mem\n").stderr
    assert again.count("dropped: with it ") == 2
    failed(run("generate", "--model", large, "--prompt", "a", *HALF, *budget, "--rest", "int4"), 1, "with --rest drop")


def test_chat_keeps_it_and_sets_it(run: Run, model: Path) -> None:
    lines = "one\n/mem\n/undo\n/set rest drop\none\n/mem\n/undo\n/set rest auto\n/set method griffin\none\n/mem\n"
    result = run("chat", "--model", model, *ANSWER, *HALF, stdin=lines)
    assert [line.split(None, 2)[2] for line in result.stderr.splitlines() if line.startswith("the rest ")] == [
        FITS,
        ASKED,
        ASKED,
    ]
    assert "error" not in result.stderr


def test_the_plan_says_it(run: Run, model: Path) -> None:
    common = ("mem-report", "--model", model, *HALF, "--prompt-tokens", "20")
    assert json.loads(run(*common, "--json").stdout)["rest"] == {"taken": "int4", "why": "fits the budget"}
    assert FITS in run(*common).stdout
    assert ASKED in run(*common, "--rest", "drop").stdout


@pytest.mark.parametrize(("form", "what"), [("safetensors", "a folder for transformers"), ("gguf", "a GGUF file")])
def test_an_export_drops_and_says_so(run: Run, model: Path, tmp_path: Path, form: str, what: str) -> None:
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    common = ("export-pruned", "--model", model, "--prompt", "Hello", "--format", form, "--out", out, "--force")
    why = f"{what} holds all neurons of a layer in one format"
    for options in ((), ("--rest", "auto")):
        result = run(*common, *options)
        assert result.exit_code == 0, result.stderr
        assert f"the rest is dropped: {why}\n" in result.stderr
    assert json.loads(run(*common, "--json").stdout)["rest"] == {"taken": "drop", "why": why}
    assert json.loads(run(*common, "--rest", "drop", "--json").stdout)["rest"]["why"] == "as asked"
    assert "the rest" not in run(*common, "--method", "griffin").stderr
    failed(run(*common, "--rest", "int8"), 2, "an export has no --resident-dtype or --rest")
    with pytest.raises(OptionError, match=f"{what} holds all neurons .* leave out rest int4"):
        Engine(model).export([5, 9], out, prompt_text="x", format=form, sparsity=0.5, rest="int4", force=True)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Data of each evaluation."""
    found = {name: tmp_path / name for name in ("perplexity", "choice", "summarise")}
    found["perplexity"].write_text(text_paragraph())
    found["choice"].write_text(json.dumps({"context": "Alice was", "choices": ["tired", "a hat"], "answer": 0}))
    found["summarise"].write_text(json.dumps({"id": 1, "article": "Alice was tired.", "summary_gt": "She slept."}))
    return found


@pytest.mark.parametrize("task", ["perplexity", "choice", "summarise"])
def test_an_evaluation_measures_what_an_answer_keeps_or_what_the_paper_drops(
    run: Run, model: Path, texts: dict[str, Path], tmp_path: Path, task: str
) -> None:
    """Whatever fits this machine: int4 unless it is asked to drop."""
    more = {
        "perplexity": ("--windows", 1, "--prompt-tokens", 20, "--continue-tokens", 4),
        "choice": (),
        "summarise": ("--out", tmp_path / "out.jsonl", "--force", "--max-new-tokens", 2),
    }[task]
    common = ("eval", task, "--model", model, "--data", texts[task], *HALF, *more)

    def labels(*options: str) -> str:
        result = run(*common, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "50%, rest int4" in labels()
    for options in (("--rest", "drop"), ("--method", "griffin")):
        assert "50% " in labels(*options)
        assert "int4" not in labels(*options)
    failed(run(*common, "--rest", "int4", "--method", "griffin"), 1, "method griffin has rest drop")


@pytest.mark.parametrize("command", ["generate", "chat", "mem-report", "eval perplexity", "bench", "export-pruned"])
def test_the_help_says_which_is_the_papers(run: Run, command: str) -> None:
    told = " ".join(run(*command.split(), "--help").stdout.split())
    assert "--rest" in told
    assert "paper" in told[told.index("--rest") :]
