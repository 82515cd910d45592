"""`griffin bench`: Griffin beside other ways to run a model, in the same memory, on this machine."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..options import AUTO, RESTS
from ..sources.resolve import CATALOGUE, resolve
from ..units import format_bytes, format_rate, parse_budget, parse_bytes
from . import _console as console
from ._flags import count, file, json_option, switch
from ._options import RESIDENT_DTYPE_OF_ROWS, option, repeated
from ._outputs import check_figure, check_outputs
from ._print import echo
from ._text import read_file

if TYPE_CHECKING:
    from ..evaluation.bench.bench import Asked, Bench

COLUMNS = (
    "method",
    "tokens",
    "prompt pass (s)",
    "again (s)",
    "x floor",
    "first token (s)",
    "tokens/s",
    "min..max",
    "of limit",
    "a token reads",
    "a token streams",
    "same tokens",
    "total (s)",
    "peak",
    "peak of RAM",
    "read",
    "note",
)
OPTIONAL = ("again (s)", "a token streams", "same tokens", "peak of RAM", "note")  # shown where a row has them


@click.command("bench", short_help="Speed and memory beside other ways to run a model.")
@click.option("--synthetic", metavar="ALIAS", help="Random weights in the shape of a known model; written once.")
@click.option("--model", metavar="NAME", help="A model: an alias, a folder, a hub id or a .gguf file.")
@option("device")
@click.option(
    "--device-memory", metavar="SIZE", help="Memory that every method may use. [default: what is free, less a margin]"
)
@click.option(
    "--host-memory",
    metavar="SIZE",
    help="RAM that griffin, and accelerate on a GPU, may keep weights in. [default: on a GPU what is free, else none]",
)
@click.option(
    "--lengths",
    default="512+128",
    show_default=True,
    metavar="P+A,...",
    help="Lengths to measure: tokens of the prompt + tokens of the answer.",
)
@click.option(
    "--methods",
    metavar="NAME,...",
    help="Methods to measure: full, accelerate, magnitude, griffin, lossless, llama-cpp. [default: all but lossless, "
    "llama-cpp only with a file]",
)
@file("--prompt-file", "A text that all methods answer, in the chat template. [default: random tokens]", dir_okay=False)
@file(
    "--llama-cpp",
    "A GGUF file of the same weights; give several (bf16, Q8_0, Q4_0) to compare.",
    "ggufs",
    multiple=True,
)
@repeated(
    "sparsity",
    "sparsities",
    (0.5,),
    "Share of the neurons that griffin does not keep as they are; magnitude drops the first of them.",
)
@repeated("resident_dtype", "resident_dtypes", ("bfloat16",), RESIDENT_DTYPE_OF_ROWS)
@repeated(
    "rest",
    "rests",
    (AUTO,),
    "What griffin does with the other neurons: auto, as an answer does (int4 where that fits, else dropped), drop (the "
    "paper's way), int8 or int4. The first of several is of all rows, the others are measured again.",
    type=click.Choice((AUTO, *RESTS)),
)
@switch("--auto", "Measure griffin again without options: what it takes to fit.")
@switch("--compile", "Measure griffin again with compiled layers, the rest dropped.")
@repeated("ffn_skip", "ffn_skips", (), "Measure griffin again with this share of the feed-forward blocks skipped.")
@option("ffn_skip_mode", default="token")
@count("--repeats", 3, "Runs of each row.")
@click.option(
    "--max-seconds",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="S",
    help="Stop a run S seconds after its first token; its total is then extrapolated, and marked ~.",
)
@click.option(
    "--stop-after",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Begin no run later than S seconds from now, and end one that takes longer. [default: never]",
)
@option("dtype")
@count("--threads", None, "Threads of every method. [default: torch's]")
@switch("--uncapped", "Do not cap the memory by a control group, even where that is possible.")
@click.option(
    "--cold/--warm",
    default=None,
    help="Drop the page cache before each run, on a GPU the model's files from it. "
    "[default: cold where that is allowed]",
)
@json_option("Print JSON lines: the machine, every run, every row.")
@file("--plot", "Draw the rows too: a .png, .pdf or .svg file, new or an earlier figure.", dir_okay=False)
def command(*, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Measure time and memory of several ways to run a model, each run in its own process.

    full: plain transformers. accelerate: transformers, reading from disk what does not fit. magnitude: pruned by the
    size of the weights. griffin: pruned for the prompt. lossless: drafted by what is resident, verified by the full
    model; give it a text, since its speed depends on what is said. All get the same prompt and take the likeliest
    token. same tokens: of the answer's first ones, as many are those of accelerate or full, of so many that both made.

    x floor: time of the prompt pass, divided by the time to read the checkpoint once (for a GPU: or to copy it there)
    or to compute the prompt, whichever is longer. Below 1 for methods that load the model beforehand. of limit:
    tokens/s, divided by the tokens/s at which memory bandwidth could read the weights of a token; `disturbed` where a
    run was faster than that limit. total: loading and
    answering. again: the prompt pass of the same prompt in the same process, once weights are in RAM; tokens/s are
    then griffin's second answer's.

    On a GPU full, the whole model, takes what it needs, whatever --device-memory says.
    """
    check_outputs("plot")
    asked = read_options(**options)
    from ..evaluation.bench import bench
    from ..evaluation.figures import plots

    if plot:
        check_figure(plot, force=False)
        plots.check(plot)
    done = bench.bench(asked, console.note, print_json if as_json else lambda result: None)
    if plot:
        bench.draw(done, plot)
        console.note(f"{plot} written")
    if not as_json:
        show(done)


def read_options(
    *,
    synthetic: str | None,
    model: str | None,
    device: str | None,
    device_memory: str | None,
    host_memory: str | None,
    lengths: str,
    methods: str | None,
    ggufs: tuple[Path, ...],
    uncapped: bool,
    compile: bool,
    prompt_file: Path | None,
    **more: Any,
) -> "Asked":
    """What to measure; the model is fetched or made only when all else is in order.

    Raises click.UsageError without one model, OptionError, and what fetching or making it raises."""
    if (synthetic is None) == (model is None):
        raise click.UsageError("give one model: --synthetic ALIAS or --model NAME")
    if synthetic is not None and synthetic.lower() not in CATALOGUE:
        raise click.UsageError(f"--synthetic {synthetic} is not an alias: see `griffin models`")
    for gguf in ggufs:
        if not gguf.is_file():
            raise click.UsageError(f"there is no file {gguf}")
    from ..evaluation.bench import bench
    from ..memory.machine import best_device, check_device, device_budget

    device = check_device(device) if device else best_device()
    asked = {
        "name": synthetic or model,
        "device": device,
        "budget": device_budget(device) if device_memory is None else parse_budget(device_memory),
        "ram": None if host_memory is None else parse_bytes(host_memory),
        "lengths": bench.parse_lengths(lengths),
        "methods": bench.parse_methods(methods, ggufs),
        "ggufs": ggufs,
        "capped": not uncapped,
        "compiles": compile,
        **more,
    }
    bench.Asked(folder=Path(), **asked)  # refuses what is out of range before the model is there
    text = read_file(str(prompt_file)) if prompt_file else ""
    folder = folder_of(synthetic, model)
    if text:
        asked["prompt"] = bench.encode(folder, text)
        answers = [lengths.answer for lengths in asked["lengths"]]
        asked["lengths"] = [bench.Lengths(len(asked["prompt"]), answer) for answer in dict.fromkeys(answers)]
    return bench.Asked(folder=folder, **asked)


def folder_of(synthetic: str | None, model: str | None) -> Path:
    if synthetic is None:
        with console.progress_bytes("Fetching") as on_progress:
            return resolve(str(model), on_progress=on_progress)
    from ..evaluation.bench.synthetic import synthesise, synthetic_folder

    found = CATALOGUE[synthetic.lower()]
    with console.progress_bytes("Writing") as on_progress:
        return synthesise(found, synthetic_folder(found.alias), on_progress)


def print_json(result: dict[str, Any]) -> None:
    echo(json.dumps(result))


def show(done: "Bench") -> None:
    """The table on stdout, below it what the machine can do."""
    rows = [cells(done.summary(row), str(row.lengths), row.label) for row in done.rows]
    shown = [i for i, name in enumerate(COLUMNS) if name not in OPTIONAL or any(row[i] for row in rows)]
    picked = [tuple(row[i] for i in shown) for row in rows]
    console.table(f"{done.asked.name}, {done.conditions}", tuple(COLUMNS[i] for i in shown), picked)
    console.pairs(facts(done), err=False)


def facts(done: "Bench") -> list[tuple[str, str]]:
    """Label and value: the limits, how the rows came about, and why some did not."""
    reading, size = done.reading, format_bytes(done.model.file_bytes)
    speed = reading.get("error") or f"{format_rate(reading['bandwidth'])} ({reading['how']})"
    lines = [*device_facts(done), ("reading", f"{speed}, a checkpoint of {size}")]
    if "page_cache" in reading:
        lines.append(("page cache", format_rate(reading["page_cache"])))
    for prompt, found in done.arithmetic.items():
        seconds = found.get("error") or f"{found['seconds']:.2f} s, threads: {found['threads']}"
        lines.append(("arithmetic", f"{prompt} tokens of prompt: {seconds}"))
    if "bandwidth" in done.new_memory:
        new, size = done.new_memory["bandwidth"], format_bytes(done.new_memory["bytes"])
        lines.append(("new memory", f"{format_rate(new)}: {size} take {done.new_memory['bytes'] / new:.2f} s, once"))
    runs = done.asked.repeats
    lines.append(("runs", f"{f'median of {runs}' if runs > 1 else 'one run'} per row, each in its own process"))
    if "products" in (found := next(iter(done.arithmetic.values()))):
        lines += [("instructions", found["instructions"]), ("products", f"of many tokens: {found['products']}")]
    if any(row.extrapolated for row in done.rows):
        lines.append(("~", f"stopped {done.asked.max_seconds:g} s after the first token; the total is extrapolated"))
    if any(row.median("prompt_again_s") for row in done.rows):
        lines.append(
            ("again", "the same prompt in the same process; griffin's tokens/s are those of its second answer")
        )
    return lines + [(f"{row.label}, {row.lengths}", said) for row in done.rows if (said := row.error or row.note)]


def device_facts(done: "Bench") -> list[tuple[str, str]]:
    """Of a GPU: its name, its bus and its memory."""
    found = done.device
    if "error" in found:
        return [("device", found["error"])]
    if not found:
        return []
    size = f", {format_bytes(found['total_bytes'])}" if "total_bytes" in found else ""
    driver = f", driver {found['driver']}" if found.get("driver") else ""
    return [
        ("device", f"{found['name']}{size}{driver}"),
        ("bus", f"{format_rate(found['bus_bandwidth'])} from pinned RAM"),
        ("device memory", format_rate(found["memory_bandwidth"])),
    ]


def cells(row: dict[str, Any], lengths: str, label: str) -> tuple[str, ...]:
    """A row of the table, with what failed as its last cell."""
    note = short(row["error"] or row["note"] or "")
    if not row["runs"]:
        filled = ["" if name in OPTIONAL else "-" for name in COLUMNS[2:-1]]
        return (label, lengths, *filled, note)
    read = max(row["rchar"] or 0, row["read_bytes"] or 0)  # mapped files are not in rchar, cached ones not in the other
    spread = f"{row['tokens_per_s_min']:.3g}..{row['tokens_per_s_max']:.3g}" if row["tokens_per_s"] else "-"
    return (
        label,
        lengths,
        f"{row['prompt_s']:.2f}",
        f"{row['prompt_again_s']:.2f}" if row["prompt_again_s"] else "",
        f"{row['x_floor']:.2f}" if row["x_floor"] else "-",
        f"{row['ttft_s']:.2f}",
        f"{row['tokens_per_s']:.3g}" if row["tokens_per_s"] else "-",
        spread,
        "disturbed" if row["limit_disturbed"] else f"{row['of_limit']:.0%}" if row["of_limit"] else "-",
        format_bytes(row["bytes_per_token"]) if row["bytes_per_token"] else "-",
        format_bytes(round(row["streamed_per_token"])) if row["streamed_per_token"] else "",
        "{} of {}".format(*row["same_tokens"]) if row["same_tokens"] else "",
        f"{'~' if row['extrapolated'] else ''}{row['total_s']:.1f}",
        format_bytes(row["peak_bytes"] or 0),
        format_bytes(row["ram_peak_bytes"]) if row["ram_peak_bytes"] else "",
        format_bytes(read),
        note,
    )


def short(error: str) -> str:
    """The start of a reason; the whole of it stands below the table."""
    return re.split(r":| at | \(", error, maxsplit=1)[0]
