"""`griffin eval summarise`: ROUGE of summaries at several sparsities. Every prediction is written to a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..jsonl import Results, read_content, read_rows
from ..paths import cache_folder
from . import _console as console
from ._flags import count, file, json_option, switch
from ._opening import opens_engine
from ._options import compares
from ._outputs import check_outputs
from ._pace import Pace
from ._print import echo

if TYPE_CHECKING:
    from ..engine import Engine
    from ..evaluation.scoring.variant import Variant
    from ..evaluation.summarise import Summary


@click.command("summarise", short_help="ROUGE of one-sentence summaries.")
@file("--data", 'Lines of {"article": the whole prompt, "summary_gt": the reference, "stop": [texts]}.', required=True)
@file(
    "--out",
    "Where predictions go, one a line. After a stop, the same command continues where it stopped.",
    required=True,
)
@switch("--force", "Replace what the --out file holds.")
@count("--limit", None, "Only the first N rows. [default: all]")
@count("--max-new-tokens", 64, "Longest summary, in tokens.")
@switch("--sampled", "Draw at temperature 0.3 by --seed, as the paper does. [default: greedy]")
@compares
@opens_engine()
@json_option()
def command(
    *,
    data: Path,
    out: Path,
    force: bool,
    limit: int | None,
    variants: "list[Variant]",
    open_engine: Callable[[], "Engine"],
    as_json: bool,
    **decoding: Any,
) -> None:
    """Let a model summarise articles, and compare with reference summaries: ROUGE-1, ROUGE-2 and ROUGE-L.

    For each article, the neurons that it uses are kept, as in any run. Sparsity 0 is the full model.
    """
    check_outputs("out")
    decoding["seed"] = click.get_current_context().params["seed"]
    from ..evaluation.summarise import KEYS, fault, mean_scores, named, rouge_scorer, summarise

    rouge_scorer()  # if it is not installed, fail before the first summary
    content = read_content(data)
    rows = read_rows(data, fault, content=content)[:limit]
    engine = open_engine()
    settings = {
        "model": os.path.realpath(engine.path),
        "dtype": engine.dtype,
        "variants": [named(variant) for variant in variants],
        "limit": limit,
        **decoding,
    }
    given: dict[str, Any] = {"source": data, "content": content, "keys": KEYS, "force": force}
    with Results(out, settings, **given, memory=cache_folder() / "finished") as results:
        if not results.finished:
            total = len(rows) * len(variants)
            with Pace(results, total, "summaries") as pace:
                told: dict[str, Any] = {"skip": results.has, "on_layer": pace.on_layer}
                for prediction in summarise(engine, rows, variants, **told, **decoding):
                    results.add(prediction)
                    pace.step()
    summaries = [mean_scores(results.rows, variant) for variant in variants]
    if as_json:
        echo(json.dumps({"model": engine.name, "results": [summary.to_json() for summary in summaries]}))
    else:
        mode = "drawn at temperature 0.3" if decoding["sampled"] else "greedy"
        title = f"{engine.name}, {engine.dtype}, {len(rows)} articles of {data.name}, {mode}; ± is the standard error"
        console.table(title, ("pruned", "ROUGE-1", "ROUGE-2", "ROUGE-L", "rows", "too long"), map(cells, summaries))
    console.note(f"every prediction is in {out}" + " already; --force makes them again" * results.finished)


def cells(summary: "Summary") -> tuple[str, ...]:
    scores = (f"{mean:.2f} ± {error:.2f}" for mean, error in summary.scores.values())
    return (summary.variant.label(), *scores, f"{summary.rows}", f"{summary.too_long}")
