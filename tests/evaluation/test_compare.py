"""All ways side by side (griffin_offload.evaluation.compare), and the sums that they are tested on."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from griffin_offload.cli import eval_compare as command
from tiny import text_paragraph, tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import PromptError
from griffin_offload.evaluation.arithmetic import KINDS, few_shot, problems
from griffin_offload.evaluation.compare import Data, calibration, compare, results, ways
from griffin_offload.evaluation.scoring.score import score
from griffin_offload.memory.measure import bytes_read
from griffin_offload.options import FfnSkip
from griffin_offload.pruning.calibration_texts import CalibrationText

SHARE = 0.5


def some_data(**changed: Any) -> Data:
    small = {"test_windows": 2, "prompt_tokens": 12, "continue_tokens": 20, "test_problems": 3, "shots": 2}
    return Data(text_paragraph() * 8, **{**small, "samples": 4, "tokens": 120, **changed})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "llama"
    return tiny_checkpoint(path, "llama", num_hidden_layers=10, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return list(compare(Engine(folder), some_data(), [SHARE], ["text", "arithmetic"]))


# Sums


def test_every_sum_is_right_and_no_two_are_alike() -> None:
    found = problems(300, seed=3)
    assert len({problem["question"] for problem in found}) == 300
    for problem in found:
        for step in problem["rationale"].removesuffix(".").split(". "):
            sides = step.split(" = ")
            assert eval(sides[0]) == int(sides[1])
        assert problem["answer"] == problem["rationale"].removesuffix(".").split()[-1]
        assert set(re.findall(r"\d+", problem["rationale"])) & set(re.findall(r"\d+", problem["question"]))
    assert found == problems(300, seed=3) != problems(300, seed=4)
    CalibrationText("sums", found)  # what calibrates takes them


def test_two_steps_use_what_the_first_one_gave() -> None:
    two = [problem for problem in problems(200) if problem["rationale"].count("=") == 2]
    assert len(two) > 200 / len(KINDS)
    for problem in two:
        first, second = problem["rationale"].removesuffix(".").split(". ")
        assert first.split(" = ")[1] in second.split(" = ")[0].split()


def test_a_sum_is_asked_behind_worked_ones(folder: Path) -> None:
    engine, found = Engine(folder), problems(5)
    pairs = few_shot(engine, found[2:], found[:2])
    text = engine.tokenizer.decode(pairs[0][0], skip_special_tokens=True)
    assert text.count("Question:") == 3
    assert text.endswith("Answer:")
    assert found[2]["question"] in text
    assert engine.tokenizer.decode(pairs[0][1]).strip() == found[2]["answer"]


# The ways


def test_every_way_is_measured_on_every_window_and_problem(rows: list[dict[str, Any]]) -> None:
    found = results(rows)
    assert found[0].way == "dense"
    assert found[0].values["kl"][0] == 0
    assert found[0].values["agreement"][0] == 1
    names = [result.way for result in found]
    expected = ["dense", *ways(SHARE, dict.fromkeys(calibration_names()))]
    assert names == expected
    assert all(set(result.values) == set(found[0].values) for result in found)
    per_way = {name: sum(row["way"] == name for row in rows) for name in names}
    assert set(per_way.values()) == {2 + 3}


def calibration_names() -> list[str]:
    return [*some_data().sources(), "random tokens", "text, Wanda's score"]


def test_each_way_differs_from_the_dense_model_and_from_the_others(rows: list[dict[str, Any]]) -> None:
    found = {result.way: result.values["perplexity"][0] for result in results(rows)}
    assert len(set(found.values())) == len(found)


def test_a_way_is_what_its_variant_scores(folder: Path, rows: list[dict[str, Any]]) -> None:
    engine, data = Engine(folder), some_data()
    prior = engine.score_samples(calibration(engine, data)["code"])
    chosen = ways(SHARE, {"code": prior})
    for name in ("GRIFFIN", "static: code", "blocks skipped by prompt", "prompt whole, then random"):
        scored = score(engine, data.windows(engine), [chosen[name]])
        losses = [-one.log_probability.mean().item() for (one,) in scored]
        ours = [row["loss"] for row in rows if row["way"] == name and row["task"] == "text"]
        assert ours == pytest.approx(losses, rel=1e-5)


def test_sums_are_answered_without_a_warm_up(rows: list[dict[str, Any]]) -> None:
    found = {result.way: result.values["log_likelihood"][0] for result in results(rows)}
    assert found["blocks skipped by token"] != found["dense"]


def test_what_stays_resident_is_told(folder: Path, rows: list[dict[str, Any]]) -> None:
    sizes = Engine(folder).sizes
    resident = {result.way: result.resident_bytes for result in results(rows)}
    assert resident["dense"] == resident["blocks skipped by token"] == sizes.resident(sizes.kept(0))
    assert resident["GRIFFIN"] == resident["static: code"] == sizes.resident(sizes.kept(SHARE))
    skipped = FfnSkip(SHARE, "prompt").count(10)
    kept = tuple((0,) if i < skipped else k for i, k in enumerate(sizes.kept(0)))
    assert resident["blocks skipped by prompt"] == sizes.resident(kept)


def test_what_tests_does_not_calibrate(folder: Path) -> None:
    engine, data = Engine(folder), some_data(articles=[article(i) for i in range(6)], test_articles=2)
    tested = "".join(engine.tokenizer.decode([*a, *b], skip_special_tokens=True) for a, b in data.windows(engine))
    texts = {name: sources[0] for name, (sources, _) in data.sources().items()}
    assert tested[:100] in data.text[: len(data.text) // 2 + 200]
    assert texts["text"].content in data.text[len(data.text) // 2 - 1 :]
    asked = {
        engine.tokenizer.decode(context, skip_special_tokens=True).rpartition("Question: ")[2]
        for context, _ in data.problems(engine)
    }
    assert not any(row["question"] in question for row in texts["arithmetic"].content for question in asked)
    assert len(texts["summaries"].content) == 4
    windows = int(0.7 * len(engine.encode(data.text, raw=True))) // 32
    with pytest.raises(PromptError, match="windows of 32"):
        replace(data, test_windows=windows).windows(engine)


def article(number: int) -> dict[str, Any]:
    text = f"###\nArticle: {text_paragraph(30)}\nSummarize in 1 sentence. {number}\n"
    return {"id": number, "article": text, "summary_gt": "Alice was tired."}


def test_what_was_measured_is_not_measured_again(folder: Path, rows: list[dict[str, Any]]) -> None:
    there = {(row["task"], row["way"], row["share"], row["id"]) for row in rows}
    again = compare(
        Engine(folder),
        some_data(),
        [SHARE],
        ["text", "arithmetic"],
        skip=lambda row: (row["task"], row["way"], row["share"], row["id"]) in there,
    )
    assert list(again) == []


def test_a_type_whose_blocks_cannot_be_skipped_is_compared_without(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "minicpm3", "minicpm3", dtype=torch.float32)
    found = results(list(compare(Engine(folder), some_data(), [SHARE], ["text"])))
    assert {"GRIFFIN", "static: code"} <= {result.way for result in found}
    assert not [result.way for result in found if "skipped" in result.way]


# Summaries, and the command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command.command, list(arguments))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    text, articles = tmp_path / "text.txt", tmp_path / "articles.jsonl"
    text.write_text(text_paragraph() * 60)
    articles.write_text("".join(json.dumps(article(i)) + "\n" for i in range(5)))
    return {"text": text, "articles": articles, "out": tmp_path / "out.jsonl"}


def test_the_command_shows_and_keeps_every_measurement(folder: Path, files: dict[str, Path]) -> None:
    pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install 'griffin-offload[eval]'")
    options = ["--model", str(folder), "--text", str(files["text"]), "--summaries", str(files["articles"])]
    options += ["--out", str(files["out"]), "--articles", "1", "--share", "0.5", "--samples", "4", "--tokens", "30"]
    options += ["--task", "summaries"]
    found = run(*options, "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)["results"]
    rows = [json.loads(line) for line in files["out"].read_text().splitlines()]
    names = {result["way"] for result in told}
    assert {"dense", "GRIFFIN", "static: summaries", "blocks skipped by token"} <= names
    assert not names & {"blocks skipped at random", "whole layers skipped by token"}, "nothing answers with them"
    assert len(rows) == len(told)
    assert all("prediction" in row for row in rows)
    static = next(row for row in rows if row["way"] == "static: code")
    assert static["prediction"] == static_answer(folder, files)


def static_answer(folder: Path, files: dict[str, Path]) -> str:
    """Of the exported model, by plain transformers."""
    from transformers import AutoModelForCausalLM

    engine = Engine(folder)
    data = Data(files["text"].read_text(), [article(i) for i in range(5)], test_articles=1, samples=4, tokens=30)
    out = files["out"].parent / "static"
    engine.export_static(calibration(engine, data)["code"], out, sparsity=0.5)
    ids = engine.encode(article(0)["article"], raw=True)
    bos = engine.tokenizer.bos_token_id
    ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    answer = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
    text = engine.tokenizer.decode(answer, skip_special_tokens=True)
    return str(text.partition("###")[0].strip())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "summaries"], "needs --summaries"),
        (["--share", "0"], "0<x<1"),
        (["--share", "1"], "0<x<1"),
        (["--samples", "2"], "4<=x"),
        (["--task", "poems"], "poems"),
    ],
)
def test_wrong_usage_is_refused(files: dict[str, Path], options: list[str], message: str) -> None:
    found = run("--text", str(files["text"]), "--out", str(files["out"]), *options)
    assert found.exit_code == 2
    assert message in found.output


def test_what_cannot_be_measured_is_refused_before_anything_is_read(folder: Path, files: dict[str, Path]) -> None:
    options = ["--text", str(files["text"]), "--out", str(files["out"]), "--model", str(folder), "--task", "text"]
    before = bytes_read()
    found = run(*options)
    assert found.exit_code == 1
    assert "reads at most 256" in str(found.exception)
    files["text"].write_text(text_paragraph())
    found = run(*options, "--force")
    assert found.exit_code == 1
    assert "the text has" in str(found.exception)
    assert bytes_read() - before < folder.stat().st_size + 2**20
