"""`griffin eval compare`: all ways to leave out feed-forward weights, on the same texts, problems and articles."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..jsonl import Results, read_rows
from ..units import format_bytes
from . import _console as console
from ._options import model_options, open_engine
from ._text import decode

if TYPE_CHECKING:
    from ..evaluation.compare import Result

TASKS = ("text", "arithmetic", "summaries")
COLUMNS = {
    "perplexity": ("perplexity", "{:.1f} ± {:.2f}"),
    "agreement": ("agreement", "{:.3f} ± {:.3f}"),
    "kl": ("KL (nats)", "{:.2f} ± {:.2f}"),
    "exact": ("sums right", "{:.0%} ± {:.0%}"),
    "log_likelihood": ("their likelihood (nats)", "{:.2f} ± {:.2f}"),
    "rouge1": ("ROUGE-1", "{:.1f} ± {:.1f}"),
    "rouge2": ("ROUGE-2", "{:.1f} ± {:.1f}"),
}


@click.command("compare", short_help="All ways to leave out weights, side by side.")
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A UTF-8 text of some length: its first half is tested on, its second half calibrates.",
)
@click.option(
    "--summaries",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Articles as `griffin eval summarise` takes them: the first ones test, the others calibrate.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where every measurement goes, a line each. After a stop the same command goes on.",
)
@click.option("--force", is_flag=True, help="Replace what the --out file holds.")
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    default=(0.25, 0.5),
    show_default=True,
    metavar="SHARE",
    help="Of the feed-forward neurons, or blocks, to leave out. Give several to compare.",
)
@click.option(
    "--task",
    "tasks",
    type=click.Choice(TASKS),
    multiple=True,
    help="What to measure; several times. [default: all for which there is data]",
)
@click.option("--windows", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Pieces of text.")
@click.option(
    "--problems", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Sums to test on."
)
@click.option("--articles", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="To summarise.")
@click.option(
    "--samples", type=click.IntRange(4), default=32, show_default=True, metavar="N", help="Samples of a calibration."
)
@click.option(
    "--tokens", type=click.IntRange(2), default=512, show_default=True, metavar="T", help="Longest sample, in tokens."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the sums, the samples, and what is drawn.",
)
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    *,
    text: Path,
    summaries: Path | None,
    out: Path,
    force: bool,
    shares: tuple[float, ...],
    tasks: tuple[str, ...],
    windows: int,
    problems: int,
    articles: int,
    samples: int,
    tokens: int,
    seed: int,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Compare GRIFFIN with skipped blocks and with static models from calibration texts.

    Each way leaves out the same share of the feed-forward neurons or blocks. Measured are the perplexity of a text,
    sums in words (answers right, and how likely the right one is), and ROUGE of summaries, with standard errors. A
    model that `griffin calibrate` has not measured is measured first.
    """
    if summaries is None and "summaries" in tasks:
        raise click.UsageError("--task summaries needs --summaries FILE")
    chosen = [task for task in TASKS if task in (tasks or TASKS) and (task != "summaries" or summaries)]
    from ..evaluation.compare import KEYS, Data, compare, results
    from ..evaluation.summarise import fault, rouge_scorer

    if "summaries" in chosen:
        rouge_scorer()  # missing, it is missed before the first measurement
    rows = read_rows(summaries, fault) if summaries else []
    data = Data(
        text=decode(text.read_bytes(), str(text)),
        articles=rows,
        test_articles=articles,
        test_problems=problems,
        test_windows=windows,
        samples=samples,
        tokens=tokens,
        seed=seed,
    )
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    settings = {
        "model": str(engine.path.resolve()),
        "dtype": engine.dtype,
        "shares": list(shares),
        "articles": [row["id"] for row in rows],
        **{name: getattr(data, name) for name in ("test_articles", "test_problems", "test_windows")},
        **{"samples": samples, "tokens": tokens, "seed": seed},
    }
    with Results(out, settings, source=text, keys=KEYS, force=force) as written:
        with console.layer_progress("Reading") as on_layer:
            for row in compare(engine, data, shares, chosen, skip=written.has, on_layer=on_layer):
                written.add(row)
        found = results(written.rows)
    if as_json:
        facts = {"model": engine.name, "dtype": engine.dtype, "results": [result.to_json() for result in found]}
        click.echo(json.dumps(facts))
        return
    for share in shares:
        show([result for result in found if result.share in (0, share)], f"{engine.name}, {share:.0%} left out")
    console.note(f"every measurement is in {out}")


def show(found: Sequence["Result"], title: str) -> None:
    there = [name for name in COLUMNS if any(name in result.values for result in found)]
    rows = []
    for result in found:
        cells = (COLUMNS[name][1].format(*result.values[name]) if name in result.values else "" for name in there)
        rows.append((result.way, format_bytes(result.resident_bytes), *cells))
    console.table(title, ("way", "resident", *(COLUMNS[name][0] for name in there)), rows)
