"""`griffin eval choice`: questions with several answers, by the log-likelihood of each."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..options import MODES
from . import _console as console
from ._options import model_options, open_engine
from .variants import variant_options, variants

if TYPE_CHECKING:
    from ..evaluation.choice import Answers, Question


@click.command("choice", short_help="Multiple choice by log-likelihood.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSONL: {"context": text, "choices": [texts], "answer": index from 0}; question or query will do for context.',
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="gen",
    show_default=True,
    help="What is the prompt. gen: the context; every token of a choice is read by the experts. class, the paper's: "
    "all that the model reads but the last token, choices included, which is kinder to pruning.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write every question's scores, as JSONL.",
)
@variant_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    *,
    data: Path,
    mode: str,
    limit: int | None,
    out: Path | None,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
    **compared: Any,
) -> None:
    """Multiple choice: of the answers given, the model takes the one that it finds likeliest.

    Normalised: the likeliest a character. A space is put between context and choice where neither has one.
    """
    chosen = variants(**compared)
    if out and not out.parent.is_dir():
        raise OptionError(f"{out}: the folder {out.parent} does not exist: make it first")
    from ..evaluation import choice

    questions = choice.read_questions(data)[:limit]
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    with console.layer_progress() as on_layer:
        results = choice.answer(engine, questions, chosen, mode, on_layer=on_layer)
    if out:
        out.write_text("".join(json.dumps(row) + "\n" for row in by_question(questions, results)), encoding="utf-8")
    if as_json:
        facts = {
            "model": engine.name,
            "model_path": str(engine.path),
            "data": str(data),
            "mode": mode,
            "questions": len(questions),
            "results": [result.to_json() for result in results],
        }
        click.echo(json.dumps(facts))
        return
    title = f"{engine.name}, {engine.dtype}, {len(questions)} questions of {data.name}, {mode} mode"
    console.table(title, ("pruned", "accuracy", "±", "normalised", "±"), [cells(result) for result in results])


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
