"""`griffin eval summarise`: ROUGE of summaries at several sparsities. Every prediction is written to a file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..jsonl import Results, read_rows
from . import _console as console
from ._options import model_options, open_engine
from .generate_many import Pace
from .variants import variant_options, variants

if TYPE_CHECKING:
    from ..evaluation.summarise import Summary


@click.command("summarise", short_help="ROUGE of one-sentence summaries.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Lines of {"article": the whole prompt, "summary_gt": the reference, "stop": [texts]}.',
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where every prediction goes, a line each. After a stop the same command goes on.",
)
@click.option("--force", is_flag=True, help="Replace what the --out file holds.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows. [default: all]")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Longest summary, in tokens.",
)
@click.option("--sampled", is_flag=True, help="Draw at temperature 0.3 by --seed, as the paper does. [default: greedy]")
@variant_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    *,
    data: Path,
    out: Path,
    force: bool,
    limit: int | None,
    max_new_tokens: int,
    sampled: bool,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
    **compared: Any,
) -> None:
    """Let a model summarise articles, and compare with reference summaries: ROUGE-1, ROUGE-2 and ROUGE-L.

    The article's neurons are chosen by the article, as in any run; sparsity 0 is the whole model.
    """
    chosen = variants(**compared)
    from ..evaluation.summarise import KEYS, fault, mean_scores, named, rouge_scorer, summarise

    rouge_scorer()  # missing, it is missed before the first summary
    rows = read_rows(data, fault)[:limit]
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    settings = {
        "model": str(engine.path.resolve()),
        "dtype": engine.dtype,
        "variants": [named(variant) for variant in chosen],
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "sampled": sampled,
        "seed": compared["seed"],
    }
    with Results(out, settings, source=data, keys=KEYS, force=force) as results:
        total = len(rows) * len(chosen)
        with Pace(results, total, "summaries") as pace, console.layer_progress() as on_layer:
            for prediction in summarise(
                engine,
                rows,
                chosen,
                sampled=sampled,
                seed=compared["seed"],
                max_new_tokens=max_new_tokens,
                skip=results.has,
                on_layer=on_layer,
            ):
                results.add(prediction)
                pace.step()
    summaries = [mean_scores(results.rows, variant) for variant in chosen]
    if as_json:
        click.echo(json.dumps({"model": engine.name, "results": [summary.to_json() for summary in summaries]}))
    else:
        how = "drawn at temperature 0.3" if sampled else "greedy"
        title = f"{engine.name}, {engine.dtype}, {len(rows)} articles of {data.name}, {how}; ± is the standard error"
        console.table(title, ("pruned", "ROUGE-1", "ROUGE-2", "ROUGE-L", "rows", "too long"), map(cells, summaries))
    console.note(f"every prediction is in {out}")


def cells(summary: "Summary") -> tuple[str, ...]:
    scores = (f"{mean:.2f} ± {error:.2f}" for mean, error in summary.scores.values())
    return (summary.variant.label(), *scores, f"{summary.rows}", f"{summary.too_long}")
