"""`griffin eval choice`: questions with several answers, by the log-likelihood of each."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..jsonl import Results, read_content
from ..options import MODES
from ..paths import cache_folder
from . import _console as console
from ._flags import count, file, json_option, switch
from ._opening import opens_engine
from ._options import compares
from ._outputs import check_outputs
from ._print import echo

if TYPE_CHECKING:
    from ..engine import Engine
    from ..evaluation.choice import Answers, Question
    from ..evaluation.scoring.variant import Variant


@click.command("choice", short_help="Multiple choice by log-likelihood.")
@file(
    "--data",
    'JSONL: {"context": text, "choices": [texts], "answer": index from 0}; question or query will do for context.',
    required=True,
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="gen",
    show_default=True,
    help="What counts as the prompt. gen: the context, so that the pruned model reads every token of a choice. class, "
    "the paper's: everything but the last token, choices included, which is kinder to pruning.",
)
@count("--limit", None, "Only the first N questions.")
@file("--out", "Write every question's scores, as JSONL.", dir_okay=False)
@switch("--force", "Replace what the --out file holds.")
@compares
@opens_engine()
@json_option()
def command(
    *,
    data: Path,
    mode: str,
    limit: int | None,
    out: Path | None,
    force: bool,
    variants: "list[Variant]",
    open_engine: Callable[[], "Engine"],
    as_json: bool,
) -> None:
    """Multiple choice: the model takes the choice to which it gives the highest likelihood.

    Normalised: the highest log-likelihood per character. A space is put between context and choice where neither has
    one.
    """
    check_outputs("out")
    if out and not out.parent.is_dir():
        raise OptionError(f"{out}: the folder {out.parent} does not exist: create it first")
    from ..evaluation import choice

    content = read_content(data)
    questions = choice.read_questions(data, content)[:limit]
    engine = open_engine()
    settings = {
        "model": os.path.realpath(engine.path),
        "dtype": engine.dtype,
        "mode": mode,
        "limit": limit,
        "variants": [json.loads(json.dumps(asdict(variant), default=repr)) for variant in variants],
    }

    def answer() -> "list[Answers]":
        with console.layer_progress() as on_layer:
            return choice.answer(engine, questions, variants, mode, on_layer=on_layer)

    if out is None:
        results = answer()
    else:
        given: dict[str, Any] = {"source": data, "content": content, "keys": (), "force": force}
        with Results(out, settings, **given, memory=cache_folder() / "finished") as written:
            if written.finished:
                console.note(f"the scores of {len(questions)} questions are in {out} already; --force makes them again")
                results = [choice.summed(v, questions, totals(written.rows, i)) for i, v in enumerate(variants)]
            else:
                results = answer()
                for row in list(by_question(questions, results))[len(written.rows) :]:
                    written.add(row)
    if as_json:
        facts = {
            "model": engine.name,
            "model_path": str(engine.path),
            "data": str(data),
            "mode": mode,
            "questions": len(questions),
            "results": [result.to_json() for result in results],
        }
        echo(json.dumps(facts))
        return
    title = f"{engine.name}, {engine.dtype}, {len(questions)} questions of {data.name}, {mode} mode"
    console.table(title, ("pruned", "accuracy", "±", "normalised", "±"), [cells(result) for result in results])


def totals(rows: Sequence[dict[str, Any]], variant: int) -> Iterator[float]:
    """Log-likelihoods of all choices of all questions by a variant, of its number, from the --out file's rows."""
    return (float(one) for row in rows for one in row["results"][variant]["log_likelihoods"])


def cells(result: "Answers") -> tuple[str, ...]:
    numbers = (
        result.accuracy,
        result.standard_error,
        result.accuracy_normalised,
        result.standard_error_normalised,
    )
    return (result.label, *(f"{number:.4f}" for number in numbers))


def by_question(questions: Sequence["Question"], results: Sequence["Answers"]) -> Iterator[dict[str, Any]]:
    for index, question in enumerate(questions):
        yield {
            "context": question.context,
            "choices": list(question.choices),
            "answer": question.answer,
            "results": [
                {
                    "label": result.label,
                    "sparsity": result.sparsity,
                    "selection": result.selection,
                    "allocation": result.allocation,
                    "seed": result.seed,
                    "log_likelihoods": list(result.log_likelihoods[index]),
                    "taken": result.taken[index],
                    "taken_normalised": result.taken_normalised[index],
                }
                for result in results
            ],
        }
