"""`griffin plot`: figures of what prompts do in a model, and of what pruning costs. Each goes to a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ..jsonl import read_rows
from ..options import ORDERS
from . import _console as console
from ._flags import F, count, decorate, file, json_option, seed_option, several, switch
from ._opening import opens_engine
from ._outputs import check_figure, check_outputs
from ._print import echo
from ._text import read_file, read_prompt

if TYPE_CHECKING:
    from ..engine import Engine

MEASURES = {
    "perplexity": "perplexity",
    "exact": "sums right",
    "log_likelihood": "likelihood of the right sum (nats)",
    "rouge2": "ROUGE-2",
}
ORDER = "Use the prompt's tokens as they are, permuted, or random tokens."
DENSITIES = (0.1, 0.25, 0.5, 0.75)


def layer_list(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """The callback of --layers: '0,10,20' -> [0, 10, 20]."""
    try:
        return None if value is None else [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers with commas between them") from None


@dataclass(frozen=True)
class Figure:
    """The file that a figure goes to, and whether its numbers are printed as JSON."""

    out: Path
    as_json: bool

    def done(self, **summary: Any) -> None:
        """The figure's path on stdout, or with --json the path and what it shows."""
        echo(json.dumps({"out": str(self.out), **summary}) if self.as_json else str(self.out))


def draws(command: F) -> F:
    """Gives a command --out, --force and --json; it gets `figure`. Raises GriffinError."""

    @wraps(command)
    def run(*, out: Path, force: bool, as_json: bool, **values: Any) -> Any:
        check_outputs("out")
        check_figure(out, force)
        return command(figure=Figure(out, as_json), **values)

    return decorate(
        cast(F, run),
        file(
            "--out",
            "The figure: a .png, .pdf or .svg file. An earlier figure is replaced.",
            required=True,
            dir_okay=False,
        ),
        switch("--force", "Replace any other file too."),
        json_option("Print the numbers in the figure as one JSON object."),
    )


def prompt_options(command: F) -> F:
    """--prompt-file, or --data with --windows and --prompt-tokens: the arguments of `texts_of`."""
    return decorate(
        command,
        click.option(
            "--prompt-file", multiple=True, metavar="FILE", help="A UTF-8 text file with a prompt. May be repeated."
        ),
        click.option("--data", metavar="FILE", help="A long UTF-8 text file to cut prompts from."),
        count("--windows", None, "Prompts to cut from --data. [default: 8]"),
        count("--prompt-tokens", None, "Tokens of each prompt from --data. [default: 512]", low=2),
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
@several("--order", "orders", ("original",), ORDER, type=click.Choice(ORDERS))
@seed_option("Seed of the permutation and of random tokens.")
@count("--tokens", 512, "Tokens to draw.")
@count("--features", 512, "Neurons to draw.")
@opens_engine()
@draws
def flocking(
    *,
    prompt_file: str,
    layers: list[int] | None,
    orders: tuple[str, ...],
    seed: int,
    tokens: int,
    features: int,
    open_engine: Callable[[], "Engine"],
    figure: Figure,
) -> None:
    """Heat map of the relative activations of a prompt's first tokens and of a layer's first neurons.

    Vertical streaks are flocking: neurons that many tokens of the prompt use. Default layers: the first, the middle and
    the last.
    """
    text = read_prompt(None, prompt_file)
    from ..evaluation.figures import observe, plots
    from ..model.long_texts import first_tokens

    plots.check(figure.out)
    engine = open_engine()
    chosen = observe.check_layers(engine, layers)
    ids = first_tokens(lambda part: engine.encode(part, raw=True, cut=True), text, tokens)[:tokens]
    panels = {}
    for order in dict.fromkeys(orders):
        with console.layer_progress() as on_layer:
            prompt = observe.reorder(engine, ids, order, seed)
            panels[order] = observe.activations(engine, prompt, chosen, tokens, features, on_layer)
    plots.flocking(panels, figure.out, f"Relative feed-forward activations, {_name(engine)}")
    strongest = {
        order: {str(layer): observe.held(matrix.square().sum(0), 0.1) for layer, matrix in by_layer.items()}
        for order, by_layer in panels.items()
    }
    figure.done(model=engine.name, tokens=len(ids), strongest_tenth_holds=strongest)


@command.command("jaccard", short_help="Overlap of kept neurons between prompts, layer by layer.")
@prompt_options
@several("--density", "densities", DENSITIES, "Share of the neurons to keep, 0 to 1.", type=float, metavar="SHARE")
@opens_engine()
@draws
def jaccard(*, densities: tuple[float, ...], figure: Figure, **options: Any) -> None:
    """Jaccard overlap of the neurons that each pair of prompts keeps, layer by layer: the mean, and that of chance.

    Give at least two prompts: --prompt-file twice or more, or --data.
    """
    from ..evaluation.figures import observe, plots

    plots.check(figure.out)
    texts = texts_of(least=2, **options)
    for density in densities:
        observe.kept_at(1, density)  # refused here, before the model is looked for
    engine, prompts = open_prompts(texts, **options)
    with console.layer_progress() as on_layer:
        statistics = observe.statistics(engine, prompts, on_layer)
    sizes = [squares.shape[1] for squares in statistics]
    overlap = {
        density: [observe.overlaps(squares, observe.kept_at(squares.shape[1], density)) for squares in statistics]
        for density in dict.fromkeys(densities)
    }
    plots.jaccard(overlap, sizes, figure.out, f"Kept neurons shared by {_prompts(prompts)}, {_name(engine)}")
    means = {str(density): [float(pairs.mean()) for pairs in by_layer] for density, by_layer in overlap.items()}
    figure.done(model=engine.name, prompts=len(prompts), mean_jaccard_per_layer=means)


@command.command("statistic", short_help="GRIFFIN's statistic s, sorted, layer by layer.")
@prompt_options
@layers_option
@opens_engine()
@draws
def statistic(*, layers: list[int] | None, figure: Figure, **options: Any) -> None:
    """The statistic s of each layer's neurons, sorted, and the share of it that the strongest neurons hold.

    With several prompts, their mean. Default: all layers.
    """
    from ..evaluation.figures import observe, plots

    plots.check(figure.out)
    texts = texts_of(least=1, **options)
    engine, prompts = open_prompts(texts, **options)
    chosen = observe.check_layers(engine, range(len(engine.skeleton.layers)) if layers is None else layers)
    with console.layer_progress() as on_layer:
        statistics = observe.statistics(engine, prompts, on_layer)
    by_layer = {layer: statistics[layer] for layer in chosen}
    plots.statistic(by_layer, figure.out, f"Sorted statistic of {_prompts(prompts)}, {_name(engine)}")
    half = {
        str(layer): sum(observe.held(row, 0.5) for row in squares) / len(squares) for layer, squares in by_layer.items()
    }
    figure.done(model=engine.name, prompts=len(prompts), strongest_half_holds=half)


@command.command("frontier", short_help="Perplexity against resident bytes, from measured results.")
@file("--results", "Output of `griffin eval perplexity --json`; more files may follow.", multiple=True)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@draws
def frontier(*, results: tuple[Path, ...], more: tuple[Path, ...], figure: Figure) -> None:
    """Perplexity against the bytes of the resident weights, one line for each way of pruning."""
    if not (results or more):
        raise click.UsageError("no results: give --results FILE, the output of `griffin eval perplexity --json`")
    from ..evaluation.figures import observe, plots

    plots.check(figure.out)
    points = observe.read_points([*results, *more])
    models = {point.model for point in points}
    title = "Perplexity against resident weights" + (f", {models.pop()}" if len(models) == 1 else "")
    plots.frontier(points, figure.out, title)
    figure.done(points=[point._asdict() for point in points])


@command.command("compare", short_help="What `griffin eval compare` measured.")
@file("--results", "The --out file of `griffin eval compare`.", required=True)
@draws
def compare(*, results: Path, figure: Figure) -> None:
    """Ways to leave out weights: perplexity, sums and summaries, with error bars of one standard error."""
    from ..evaluation import compare
    from ..evaluation.figures import plots

    plots.check(figure.out)
    found = compare.results(read_rows(results, compare.fault, compare.KEYS))
    if Path(f"{results}.state").exists():
        console.note(f"{results} is of a run that was stopped: `griffin eval compare` has not measured everything yet")
    panels = {
        title: [(result.way, result.share, *result.values[name]) for result in found if name in result.values]
        for name, title in MEASURES.items()
    }
    plots.ways({title: panel for title, panel in panels.items() if panel}, figure.out, "Ways to leave out weights")
    figure.done(results=[result.to_json() for result in found])


def texts_of(
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
            raise click.UsageError(f"--windows {windows} is too few: at least {least} prompts are needed")
        return [read_file(data)]
    if windows is not None or prompt_tokens is not None:
        raise click.UsageError("--windows and --prompt-tokens need --data FILE")
    if len(prompt_file) < least:
        needed = "--prompt-file FILE" if least == 1 else f"--prompt-file FILE {least} times or more"
        raise click.UsageError(f"too few prompts: give {needed}, or --data FILE")
    return [read_prompt(None, name) for name in prompt_file]


def open_prompts(
    texts: list[str],
    *,
    open_engine: Callable[[], "Engine"],
    data: str | None,
    windows: int | None,
    prompt_tokens: int | None,
    **rest: Any,
) -> "tuple[Engine, list[list[int]]]":
    """The engine and the prompts' token ids."""
    from ..evaluation.figures import observe

    engine = open_engine()
    if data is not None:
        return engine, observe.cut_prompts(engine, texts[0], windows or 8, prompt_tokens or 512)
    return engine, [engine.encode(text, raw=True) for text in texts]


def _prompts(prompts: list[list[int]]) -> str:
    return "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"


def _name(engine: "Engine") -> str:
    return Path(engine.name).name
