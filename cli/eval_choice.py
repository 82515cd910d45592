"""`griffin eval choice`: questions with several answers, by the log-likelihood of each."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..options import MODES
from . import _console as console
from ._options import compares, count, file, json_option, opens_engine

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
@compares
@opens_engine()
@json_option()
def command(
    *,
    data: Path,
    mode: str,
    limit: int | None,
    out: Path | None,
    variants: "list[Variant]",
    open_engine: Callable[[], "Engine"],
    as_json: bool,
) -> None:
    """Multiple choice: the model takes the choice to which it gives the highest likelihood.

    Normalised: the highest log-likelihood per character. A space is put between context and choice where neither has
    one.
    """
    if out and not out.parent.is_dir():
        raise OptionError(f"{out}: the folder {out.parent} does not exist: create it first")
    from ..evaluation import choice

    questions = choice.read_questions(data)[:limit]
    engine = open_engine()
    with console.layer_progress() as on_layer:
        results = choice.answer(engine, questions, variants, mode, on_layer=on_layer)
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
        out(json.dumps(facts))
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
