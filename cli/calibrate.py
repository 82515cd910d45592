"""`griffin calibrate`: measure once how much each layer's neurons matter, for --allocation sensitivity."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from . import _console as console
from ._options import model_options, open_engine
from ._text import read_file

if TYPE_CHECKING:
    from ..engine import Engine
    from ..pruning.layer_allocation import Curves

SHOWN = 6  # layers


@click.command("calibrate", short_help="Measure which layers need their neurons most.")
@click.option("--data", metavar="FILE", help="A UTF-8 text like those the model is for. [default: plain English prose]")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=384,
    show_default=True,
    metavar="P",
    help="Tokens that experts are chosen from, in each window of the text.",
)
@click.option(
    "--continue-tokens",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    metavar="C",
    help="Tokens after them that the output is compared at.",
)
@click.option(
    "--windows", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Windows spread over the text."
)
@click.option("--force", is_flag=True, help="Measure again, and replace what was measured before.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the file, and all that was measured.")
def command(
    *,
    data: str | None,
    prompt_tokens: int,
    continue_tokens: int,
    windows: int,
    force: bool,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Measure which layers need their neurons most.

    Every layer keeps half of its neurons, one of them a quarter, three quarters or all, and the output is compared with
    the full model's. The result goes to a small file in the cache; --allocation sensitivity then gives more neurons to
    the layers that need them, and fewer to the others, at the same size. Measured once for a model.
    """
    text = read_file(data) if data is not None else None
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    from ..evaluation.calibrate import calibrate

    with console.layer_progress("Measuring, layer by layer") as on_progress:
        path, curves = calibrate(
            engine,
            text,
            prompt_tokens=prompt_tokens,
            continue_tokens=continue_tokens,
            windows=windows,
            force=force,
            on_progress=on_progress,
        )
    if as_json:
        click.echo(json.dumps({"path": str(path), **asdict(curves)}))
        return
    title = f"{engine.name}: the layers that matter most, of {len(curves.kl)}"
    columns = ("layer", "weight (average: about 1)", "kept when half are, in all", "when three quarters are")
    console.table(title, columns, rows(engine, curves))
    console.pairs([("written to", str(path)), ("used by", "--allocation sensitivity")], err=False)


def rows(engine: "Engine", curves: "Curves") -> Iterator[tuple[str, ...]]:
    """The layers with the largest weights."""
    from ..pruning.layer_allocation import share_neurons

    neurons, weights = [layer.blocks[0].neurons for layer in engine.skeleton.layers], curves.weights
    half, more = share_neurons(curves, neurons, 0.5), share_neurons(curves, neurons, 0.25)
    for layer in sorted(range(len(neurons)), key=lambda i: -weights[i])[:SHOWN]:
        shares = (f"{kept[layer] / neurons[layer]:.0%}" for kept in (half, more))
        yield str(layer), f"{weights[layer]:.2f}", *shares
