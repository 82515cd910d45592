"""`griffin calibrate`: measure once how much each layer's neurons matter."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from . import _console as console
from ._flags import count, json_option, switch
from ._opening import opens_engine
from ._print import echo
from ._text import read_file

if TYPE_CHECKING:
    from ..engine import Engine
    from ..pruning.layer_allocation import Curves

SHOWN = 6  # layers


@click.command("calibrate", short_help="Measure which layers need their neurons most.")
@click.option(
    "--data",
    metavar="FILE",
    help="A UTF-8 text like those the model is for. [default: questions, answers, code and prose that ship]",
)
@count("--prompt-tokens", 232, "Tokens of each window that the kept neurons are chosen from.", metavar="P")
@count(
    "--continue-tokens",
    24,
    "Tokens after them, whose predictions are compared with the full model's.",
    metavar="C",
    low=2,
)
@count("--windows", 12, "Windows spread over the text.")
@switch("--force", "Measure again, and replace the earlier measurement.")
@opens_engine()
@json_option("Print one JSON object: the file, and every measurement.")
def command(*, data: str | None, open_engine: Callable[[], "Engine"], as_json: bool, **windows: Any) -> None:
    """Measure which layers need their neurons most.

    All layers keep half of their neurons, except for one at a time, which keeps a quarter or all of them; the
    predictions are compared with the full model's. The result goes to a small file in the cache, once for
    each model. From then on answers keep more neurons in the layers that need them and fewer in the others, at the same
    size in total; --allocation uniform has all layers the same.
    """
    text = read_file(data) if data is not None else None
    engine = open_engine()
    from ..evaluation.calibrate import calibrate

    with console.layer_progress("Measuring, layer by layer") as on_progress:
        path, curves = calibrate(engine, text, on_progress=on_progress, **windows)
    if as_json:
        echo(json.dumps({"path": str(path), **asdict(curves)}))
        return
    title = f"{engine.name}: the layers that matter most, of {len(curves.kl)}"
    columns = ("layer", "weight (average: about 1)", "kept at sparsity 0.5", "kept at sparsity 0.25")
    console.table(title, columns, rows(engine, curves))
    console.pairs([("written to", str(path)), ("used by", "every answer, unless --allocation uniform")], err=False)


def rows(engine: "Engine", curves: "Curves") -> Iterator[tuple[str, ...]]:
    """The layers with the largest weights."""
    from ..pruning.layer_allocation import share_neurons

    neurons, weights = [layer.blocks[0].neurons for layer in engine.skeleton.layers], curves.weights
    half, more = share_neurons(curves, neurons, 0.5), share_neurons(curves, neurons, 0.25)
    for layer in sorted(range(len(neurons)), key=lambda i: -weights[i])[:SHOWN]:
        shares = (f"{kept[layer] / neurons[layer]:.0%}" for kept in (half, more))
        yield str(layer), f"{weights[layer]:.2f}", *shares
