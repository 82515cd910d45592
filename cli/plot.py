"""`griffin plot`: figures of what prompts do in a model, and of what pruning costs. Each goes to a file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..jsonl import read_rows
from ..options import ORDERS
from . import _console as console
from ._options import F, decorate, model_options, open_engine
from ._text import read_file, read_prompt

if TYPE_CHECKING:
    from ..engine import Engine

MEASURES = {
    "perplexity": "perplexity",
    "exact": "sums right",
    "log_likelihood": "likelihood of the right sum (nats)",
    "rouge2": "ROUGE-2",
}
DENSITIES = (0.1, 0.25, 0.5, 0.75)


def layer_list(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """The callback of --layers: '0,10,20' -> [0, 10, 20]."""
    try:
        return None if value is None else [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers with commas between them") from None


def out_options(command: F) -> F:
    """--out and --json."""
    return decorate(
        command,
        click.option(
            "--out",
            required=True,
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="The figure: a .png, .pdf or .svg file. One of that name is replaced.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print what was drawn, in numbers, as one JSON object."),
    )


def prompt_options(command: F) -> F:
    """--prompt-file, or --data with --windows and --prompt-tokens: the arguments of `read_prompts`."""
    return decorate(
        command,
        click.option("--prompt-file", multiple=True, metavar="FILE", help="A UTF-8 text file; give one a prompt."),
        click.option("--data", metavar="FILE", help="A long UTF-8 text file to cut prompts from."),
        click.option("--windows", type=click.IntRange(1), metavar="N", help="Prompts cut from --data. [default: 8]"),
        click.option(
            "--prompt-tokens", type=click.IntRange(2), metavar="N", help="Tokens of each of them. [default: 512]"
        ),
    )


layers_option = click.option("--layers", callback=layer_list, metavar="I,J,...", help="Layers to draw, from 0.")


@click.group("plot", short_help="Draw flocking, overlap, statistic or frontier.")
def command() -> None:
    """Draw a figure to a .png, .pdf or .svg file.

    Prompts are given to the model as they are, without its chat template.
    """


@command.command("flocking", short_help="Heat map of relative activations: tokens by neurons.")
@click.option("--prompt-file", required=True, metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@layers_option
@click.option(
    "--order",
    "orders",
    type=click.Choice(ORDERS),
    multiple=True,
    default=("original",),
    show_default=True,
    help="The prompt's tokens as they are, permuted, or random ones instead. Give several to compare, a row each.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of permuted and random.")
@click.option("--tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Tokens to draw.")
@click.option(
    "--features", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Neurons to draw."
)
@model_options
@out_options
def flocking(
    *,
    prompt_file: str,
    layers: list[int] | None,
    orders: tuple[str, ...],
    seed: int,
    tokens: int,
    features: int,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Heat map of the relative activations of a prompt's first tokens and of a layer's first neurons.

    Vertical streaks are flocking: neurons that many tokens of the prompt use. Without --layers: the first, the middle
    and the last.
    """
    text = read_prompt(None, prompt_file)
    from ..evaluation.figures import observe, plots

    plots.check(out)
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    chosen = observe.check_layers(engine, layers)
    ids = engine.encode(text, raw=True)[:tokens]
    panels = {}
    for order in dict.fromkeys(orders):
        with console.layer_progress() as on_layer:
            prompt = observe.reorder(engine, ids, order, seed)
            panels[order] = observe.activations(engine, prompt, chosen, tokens, features, on_layer)
    plots.flocking(panels, out, f"Relative feed-forward activations, {_name(engine)}")
    strongest = {
        order: {str(layer): observe.held(matrix.square().sum(0), 0.1) for layer, matrix in by_layer.items()}
        for order, by_layer in panels.items()
    }
    _done(out, as_json, model=engine.name, tokens=len(ids), strongest_tenth_holds=strongest)


@command.command("jaccard", short_help="Overlap of experts between prompts, layer by layer.")
@prompt_options
@click.option(
    "--density",
    "densities",
    type=float,
    multiple=True,
    default=DENSITIES,
    show_default=True,
    metavar="SHARE",
    help="Share of the neurons that is kept, 0 to 1. Give several to compare, a panel each.",
)
@model_options
@out_options
def jaccard(*, densities: tuple[float, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Jaccard overlap of the experts of each pair of prompts, layer by layer: the mean, beside what chance would give.

    Give at least two prompts: --prompt-file twice or more, or --data.
    """
    from ..evaluation.figures import observe, plots

    plots.check(out)
    texts = _texts(least=2, **options)
    for density in densities:
        observe.kept_at(1, density)  # refused here, before the model is looked for
    engine, prompts = _open(texts, **options)
    with console.layer_progress() as on_layer:
        statistics = observe.statistics(engine, prompts, on_layer)
    sizes = [squares.shape[1] for squares in statistics]
    overlap = {
        density: [observe.overlaps(squares, observe.kept_at(squares.shape[1], density)) for squares in statistics]
        for density in dict.fromkeys(densities)
    }
    plots.jaccard(overlap, sizes, out, f"Experts shared by {_prompts(prompts)}, {_name(engine)}")
    means = {str(density): [float(pairs.mean()) for pairs in by_layer] for density, by_layer in overlap.items()}
    _done(out, as_json, model=engine.name, prompts=len(prompts), mean_jaccard_per_layer=means)


@command.command("statistic", short_help="GRIFFIN's statistic s, sorted, layer by layer.")
@prompt_options
@layers_option
@model_options
@out_options
def statistic(*, layers: list[int] | None, out: Path, as_json: bool, **options: Any) -> None:
    """The statistic s of each layer's neurons, sorted, and the share of it that the strongest neurons hold.

    With several prompts, their mean. Without --layers: all layers.
    """
    from ..evaluation.figures import observe, plots

    plots.check(out)
    texts = _texts(least=1, **options)
    engine, prompts = _open(texts, **options)
    chosen = observe.check_layers(engine, range(len(engine.skeleton.layers)) if layers is None else layers)
    with console.layer_progress() as on_layer:
        statistics = observe.statistics(engine, prompts, on_layer)
    by_layer = {layer: statistics[layer] for layer in chosen}
    plots.statistic(by_layer, out, f"Sorted statistic of {_prompts(prompts)}, {_name(engine)}")
    half = {
        str(layer): sum(observe.held(row, 0.5) for row in squares) / len(squares) for layer, squares in by_layer.items()
    }
    _done(out, as_json, model=engine.name, prompts=len(prompts), strongest_half_holds=half)


@command.command("frontier", short_help="Perplexity against resident bytes, from measured results.")
@click.option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `griffin eval perplexity --json` printed; more files may follow.",
)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@out_options
def frontier(*, results: tuple[Path, ...], more: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Perplexity against the bytes of the weights that stay resident, one line for what differs between the results."""
    if not (results or more):
        raise click.UsageError("no results: give --results FILE, what `griffin eval perplexity --json` printed")
    from ..evaluation.figures import observe, plots

    plots.check(out)
    points = observe.read_points([*results, *more])
    models = {point.model for point in points}
    title = "Perplexity against resident weights" + (f", {models.pop()}" if len(models) == 1 else "")
    plots.frontier(points, out, title)
    _done(out, as_json, points=[point._asdict() for point in points])


@command.command("compare", short_help="What `griffin eval compare` measured.")
@click.option(
    "--results",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The --out file of `griffin eval compare`.",
)
@out_options
def compare(*, results: Path, out: Path, as_json: bool) -> None:
    """Every way to leave out weights: perplexity, sums and summaries, with bars of one standard error."""
    from ..evaluation import compare
    from ..evaluation.figures import plots

    plots.check(out)
    found = compare.results(read_rows(results, compare.fault, compare.KEYS))
    panels = {
        title: [(result.way, result.share, *result.values[name]) for result in found if name in result.values]
        for name, title in MEASURES.items()
    }
    plots.ways({title: panel for title, panel in panels.items() if panel}, out, "Ways to leave out weights")
    _done(out, as_json, results=[result.to_json() for result in found])


def _texts(
    *,
    least: int,
    prompt_file: tuple[str, ...],
    data: str | None,
    windows: int | None,
    prompt_tokens: int | None,
    **rest: Any,
) -> list[str]:
    """The prompts' texts, or the long one that they are cut from. Raises click.UsageError, PromptError."""
    if data is not None:
        if prompt_file:
            raise click.UsageError("--prompt-file and --data both give prompts: leave one out")
        if windows is not None and windows < least:
            raise click.UsageError(f"--windows {windows} is too few: {least} prompts or more are compared")
        return [read_file(data)]
    if windows is not None or prompt_tokens is not None:
        raise click.UsageError("--windows and --prompt-tokens cut prompts from --data: give it, or leave them out")
    if len(prompt_file) < least:
        needed = "--prompt-file FILE" if least == 1 else f"--prompt-file FILE {least} times or more"
        raise click.UsageError(f"too few prompts: give {needed}, or --data FILE")
    return [read_prompt(None, name) for name in prompt_file]


def _open(
    texts: list[str],
    *,
    data: str | None,
    windows: int | None,
    prompt_tokens: int | None,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    **rest: Any,
) -> "tuple[Engine, list[list[int]]]":
    """The engine and the prompts' token ids."""
    from ..evaluation.figures import observe

    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    if data is not None:
        return engine, observe.cut_prompts(engine, texts[0], windows or 8, prompt_tokens or 512)
    return engine, [engine.encode(text, raw=True) for text in texts]


def _prompts(prompts: list[list[int]]) -> str:
    return "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"


def _name(engine: "Engine") -> str:
    return Path(engine.name).name


def _done(out: Path, as_json: bool, **summary: Any) -> None:
    """The figure's path on stdout, or with --json the path and what it shows."""
    click.echo(json.dumps({"out": str(out), **summary}) if as_json else str(out))
