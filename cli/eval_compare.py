"""`griffin eval compare`: all ways to leave out feed-forward weights, on the same texts, problems and articles."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GriffinError
from ..jsonl import Results, read_content, read_rows
from ..paths import cache_folder
from ..units import format_bytes
from . import _console as console
from ._flags import count, file, json_option, seed_option, several, switch
from ._opening import opens_engine
from ._outputs import check_outputs
from ._print import echo
from ._text import decode

if TYPE_CHECKING:
    from ..engine import Engine
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
@file("--text", "A long UTF-8 text: its first half is for testing, its second half for calibration.", required=True)
@file(
    "--summaries",
    "Articles as `griffin eval summarise` takes them: the first ones are for testing, the others for calibration.",
)
@file(
    "--out",
    "Where measurements go, one a line. After a stop, the same command continues where it stopped.",
    required=True,
)
@switch("--force", "Replace what the --out file holds.")
@several(
    "--share",
    "shares",
    (0.25, 0.5),
    "Share of the feed-forward neurons or blocks to leave out.",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
)
@several("--task", "tasks", (), "What to measure.", "all for which there is data", type=click.Choice(TASKS))
@count("--windows", 8, "Windows of text to test on.", "test_windows")
@count("--problems", 100, "Sums to test on.", "test_problems")
@count("--articles", 16, "Articles to summarise.", "test_articles")
@count("--samples", 32, "Samples to calibrate with.", low=4)
@count("--tokens", 512, "Longest sample, in tokens.", metavar="T", low=2)
@seed_option("Seed of the sums, the samples, and of whatever else is drawn.")
@opens_engine()
@json_option("Print one JSON object instead of tables.")
def command(
    *,
    text: Path,
    summaries: Path | None,
    out: Path,
    shares: tuple[float, ...],
    tasks: tuple[str, ...],
    open_engine: Callable[[], "Engine"],
    as_json: bool,
    **data: Any,
) -> None:
    """Compare GRIFFIN with skipped blocks and with static models from calibration texts.

    Each method leaves out the same share of the feed-forward neurons or blocks. It measures the perplexity of a text,
    sums in words (correct answers, and the likelihood of the correct one) and ROUGE of summaries, with standard errors.
    A model that `griffin calibrate` has not measured is measured first.
    """
    check_outputs("out")
    if summaries is None and "summaries" in tasks:
        raise click.UsageError("--task summaries needs --summaries FILE")
    chosen = [task for task in TASKS if task in (tasks or TASKS) and (task != "summaries" or summaries)]
    from ..evaluation.compare import KEYS, Data, compare, results
    from ..evaluation.summarise import fault, rouge_scorer

    if "summaries" in chosen:
        rouge_scorer()  # if it is not installed, fail before the first measurement
    rows = read_rows(summaries, fault) if summaries else []
    force = data.pop("force")
    content = read_content(text)
    texts = Data(text=decode(content, str(text)), articles=rows, **data)
    engine = open_engine()
    settings = {
        "model": os.path.realpath(engine.path),
        "dtype": engine.dtype,
        "shares": list(shares),
        "articles": [row["id"] for row in rows],
        **data,
    }
    given: dict[str, Any] = {"source": text, "content": content, "keys": KEYS, "force": force}
    with Results(out, settings, **given, memory=cache_folder() / "finished") as written:
        if written.finished and not {row["task"] for row in written.rows}.issuperset(chosen):
            raise GriffinError(f"{out} exists, with other tasks: choose another name, or --force to replace it")
        if not written.finished:
            with console.layer_progress("Reading") as on_layer:
                for row in compare(engine, texts, shares, chosen, skip=written.has, on_layer=on_layer):
                    written.add(row)
        found = results(written.rows)
    if as_json:
        facts = {"model": engine.name, "dtype": engine.dtype, "results": [result.to_json() for result in found]}
        echo(json.dumps(facts))
        return
    for share in shares:
        show([result for result in found if result.share in (0, share)], f"{engine.name}, {share:.0%} left out")
    console.note(f"every measurement is in {out}" + " already; --force makes them again" * written.finished)


def show(found: Sequence["Result"], title: str) -> None:
    there = [name for name in COLUMNS if any(name in result.values for result in found)]
    rows = []
    for result in found:
        cells = (COLUMNS[name][1].format(*result.values[name]) if name in result.values else "" for name in there)
        rows.append((result.way, format_bytes(result.resident_bytes), *cells))
    console.table(title, ("way", "resident", *(COLUMNS[name][0] for name in there)), rows)
