"""Summaries and their ROUGE: what the model is given, where its answer ends, what the scores are the means of."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from disk import disk_of
from griffin_offload.cli.eval_summarise import command
from tiny import BOS, BOS_ID, CONTEXT, text_paragraph, tiny_checkpoint
from tokenizers import Tokenizer

from griffin_offload import Engine
from griffin_offload.errors import GriffinError, OptionError, PromptError
from griffin_offload.evaluation.scoring.variant import FULL, Variant
from griffin_offload.evaluation.summarise import (
    ROUGE,
    encode_article,
    fault,
    mean_scores,
    rouge_scorer,
    summarise,
    until_stop,
)
from griffin_offload.jsonl import Row, read_rows

pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install 'griffin-offload[eval]'")

HALF = Variant(0.5, method="griffin")
UNPACKED = {"resident_dtype": "bfloat16", "rest": "drop", "folds": None}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("summarise") / "llama", "llama", chat=True)


@pytest.fixture(scope="session")
def engine(model: Path) -> Engine:
    return Engine(model, dtype="float32")


@pytest.fixture
def rows() -> list[Row]:
    words = text_paragraph().split()
    return [
        {"id": number, "article": " ".join(words[number * 20 : number * 20 + 15]), "summary_gt": "Alice was tired"}
        for number in range(1, 4)
    ]


@pytest.fixture
def data(tmp_path: Path, rows: list[Row]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predictions(engine: Engine, rows: list[Row], variant: Variant = HALF, **options: Any) -> list[Row]:
    return list(summarise(engine, rows, [variant], **{"max_new_tokens": 16, **options}))


# The text


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        (" He won.", "He won."),  # without a stop text no character is lost
        ("\nHe won.\n\n###\nArticle: She", "He won."),
        ("He won.#", "He won.#"),
        ("He won.##\n", "He won.##"),
        ("He won####", "He won"),
        ("###", ""),
        ("", ""),
        ("He\n---won###", "He"),
    ],
)
def test_the_summary_ends_at_the_first_stop_text(text: str, summary: str) -> None:
    assert until_stop(text, ["###", "---"]) == summary


def test_an_answer_is_the_plain_continuation_up_to_the_stop_text(engine: Engine, rows: list[Row]) -> None:
    row = rows[0]
    ids = engine.encode(row["article"], raw=True)
    whole = engine.generate(ids, sparsity=0.5, method="griffin", max_new_tokens=16, do_sample=False)
    (free,) = predictions(engine, [row])
    assert free["prediction"] == whole.text.strip()
    assert free["tokens"] == 16
    stop = engine.tokenizer.decode(whole.token_ids[5:7])
    (cut,) = predictions(engine, [row | {"stop": [stop]}])
    assert cut["prediction"] == whole.text[: whole.text.index(stop)].strip()
    assert cut["tokens"] == 7  # and the model was not asked for what nobody reads


@pytest.mark.parametrize(
    ("adds", "bos", "expected"), [(True, BOS, [BOS_ID]), (False, BOS, [BOS_ID]), (False, None, [])]
)
def test_there_is_one_bos_where_the_tokenizer_has_one(
    tmp_path: Path, adds: bool, bos: str | None, expected: list[int]
) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", "llama")
    if not adds:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["post_processor"] = None
        Tokenizer.from_str(json.dumps(tokenizer)).save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": bos}))
    engine = Engine(folder)
    assert engine.tokenizer.bos_token == bos
    ids = encode_article(engine, "Alice")
    assert ids[: len(expected)] == expected
    assert engine.tokenizer.decode(ids[len(expected) :]) == "Alice"


@pytest.mark.real
def test_the_real_models_get_one_bos(smol: Path, gemma: Path) -> None:
    for folder in (smol, gemma):
        engine = Engine(folder)
        ids = encode_article(engine, "###\nArticle: One.")
        assert ids.count(engine.tokenizer.bos_token_id) == 1
        assert ids[0] == engine.tokenizer.bos_token_id
        assert engine.tokenizer.decode(ids[1:]) == "###\nArticle: One."


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"article": "a", "summary_gt": "b"}, None),
        ({"article": "a", "summary_gt": "b", "stop": ["###"]}, None),
        ({"summary_gt": "b"}, '"article"'),
        ({"article": "a", "summary_gt": " "}, '"summary_gt"'),
        ({"article": 1, "summary_gt": "b"}, '"article"'),
        ({"article": "a", "summary_gt": "b", "stop": "###"}, '"stop"'),
        ({"article": "a", "summary_gt": "b", "stop": [""]}, '"stop"'),
    ],
)
def test_rows_are_checked(row: Row, word: str | None) -> None:
    found = fault(row)
    assert found is None if word is None else word in str(found)


# The scores


def test_scores_are_f_measures_of_stems_in_percent(engine: Engine, rows: list[Row]) -> None:
    (row,) = predictions(engine, rows[:1])
    perfect = rows[0] | {"summary_gt": f"{row['prediction']} alice"}
    (again,) = predictions(engine, [perfect])
    scores = rouge_scorer().score(perfect["summary_gt"], row["prediction"])
    assert 0 < scores["rouge1"].fmeasure < scores["rouge1"].precision == 1
    assert {name: again[name] for name in ROUGE} == {name: 100 * scores[name].fmeasure for name in ROUGE}
    assert rouge_scorer().score("cats were running", "cat running")["rouge1"].fmeasure == pytest.approx(0.8)


def scored(number: int, value: float, sparsity: float = 0.5) -> Row:
    named = {"sparsity": sparsity, "selection": "topk", "allocation": "uniform", **UNPACKED}
    return {"id": number, **named, "rouge1": value, "rouge2": 2 * value, "rougeL": 7.0}


def test_means_and_standard_errors_are_of_one_variant_without_what_was_too_long() -> None:
    too_long = {key: value for key, value in scored(4, 0).items() if "rouge" not in key} | {"error": "too long"}
    rows = [scored(1, 10), scored(2, 20), scored(3, 60), too_long, scored(1, 99, sparsity=0.0)]
    summary = mean_scores(rows, HALF)
    assert (summary.rows, summary.too_long) == (3, 1)
    spread = math.sqrt((20**2 + 10**2 + 30**2) / 2 / 3)
    assert summary.scores["rouge1"] == pytest.approx((30, spread))
    assert summary.scores["rouge2"] == pytest.approx((60, 2 * spread))
    assert summary.scores["rougeL"] == (7, 0)
    assert mean_scores(rows, FULL).to_json() == {
        **{"sparsity": 0.0, "selection": "topk", "allocation": "uniform", **UNPACKED, "rows": 1, "too_long": 0},
        **{"rouge1": 99, "rouge1_standard_error": 0, "rouge2": 198, "rouge2_standard_error": 0},
        **{"rougeL": 7, "rougeL_standard_error": 0},
    }
    with pytest.raises(PromptError, match="too long"):
        mean_scores([too_long], HALF)


def test_a_row_beyond_the_context_is_an_error_of_its_own(engine: Engine, rows: list[Row]) -> None:
    rows[1]["article"] = "word " * CONTEXT
    found = predictions(engine, rows)
    assert ["error" in row for row in found] == [False, True, False]
    assert str(CONTEXT) in found[1]["error"]
    assert mean_scores(found, HALF).too_long == 1


def test_draws_depend_on_the_seed_and_the_place_and_not_on_what_came_before(engine: Engine, rows: list[Row]) -> None:
    same = [rows[0] | {"id": number} for number in range(3)]
    found = predictions(engine, same, sampled=True, seed=3)
    assert len({row["prediction"] for row in found}) == 3  # each its own draw
    assert found == predictions(engine, same, sampled=True, seed=3)
    assert found != predictions(engine, same, sampled=True, seed=9)
    rest = predictions(engine, same, sampled=True, seed=3, skip=lambda row: row["id"] < 2)
    assert rest == found[2:]
    assert len({row["prediction"] for row in predictions(engine, same)}) == 1  # greedy


def test_the_full_model_draws_by_the_seed_too(engine: Engine, rows: list[Row]) -> None:
    first, second = (predictions(engine, rows, FULL, sampled=True, seed=seed) for seed in (0, 2**32 - 1))
    assert first != second


# The command


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def options(data: Path, model: Path, name: str = "out.jsonl") -> tuple[object, ...]:
    files = ("--data", data, "--out", data.with_name(name), "--model", model, "--dtype", "float32")
    return (*files, "--max-new-tokens", 16)


def test_every_prediction_is_written_and_the_means_are_printed(data: Path, model: Path, engine: Engine) -> None:
    result = run(*options(data, model), "--sparsity", 0, "--sparsity", 0.5, "--method", "griffin", "--json")
    written = read_rows_of(data.with_name("out.jsonl"))
    expected = [row for variant in (FULL, HALF) for row in predictions(engine, read_rows(data), variant)]
    assert written == expected
    summaries = [mean_scores(expected, variant).to_json() for variant in (FULL, HALF)]
    assert json.loads(result.stdout) == {"model": str(model), "results": summaries}
    assert "out.jsonl" in result.stderr


def read_rows_of(path: Path) -> list[Row]:
    """Of several variants: ids come more than once."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_and_the_limit(data: Path, model: Path) -> None:
    result = run(*options(data, model), "--limit", 2)
    lines = [line.split() for line in result.stdout.splitlines()]
    table = [line for line in lines if line[:1] in (["full"], ["50%,"])]
    assert [line[0] for line in table] == ["full", "50%,"]  # what is compared unless asked otherwise
    assert [line[-2:] for line in table] == [["2", "0"], ["2", "0"]]
    assert len(read_rows_of(data.with_name("out.jsonl"))) == 4


def test_a_stopped_run_goes_on_to_the_same_end(data: Path, model: Path) -> None:
    full, out = data.with_name("full.jsonl"), data.with_name("out.jsonl")
    uninterrupted = run(*options(data, model, full.name), "--sampled", "--json")
    lines = full.read_bytes().splitlines(keepends=True)
    # The disk is full in the last but one row.
    with disk_of(sum(map(len, lines[:4])) + 10), pytest.raises(GriffinError, match="cannot write"):
        run(*options(data, model), "--sampled", "--json")
    assert out.read_bytes() == b"".join(lines)[: out.stat().st_size]
    with pytest.raises(GriffinError, match="begun with sampled true, and this run has false"):
        run(*options(data, model))
    resumed = run(*options(data, model), "--sampled", "--json")
    assert "continuing after 4 of 6 summaries" in resumed.stderr
    assert out.read_bytes() == full.read_bytes()
    assert resumed.stdout == uninterrupted.stdout
    assert sorted(path.name for path in data.parent.iterdir()) == ["data.jsonl", "full.jsonl", "out.jsonl"]


def test_without_rouge_score_the_way_out_is_named(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(OptionError, match=r"pip install 'griffin-offload\[eval\]'"):
        run(*options(data, model))
    assert not data.with_name("out.jsonl").exists()
