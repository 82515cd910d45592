"""`griffin eval perplexity`: how well the pruned model predicts a text after a prompt from that text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..units import format_bytes
from . import _console as console
from ._options import model_options, open_engine
from ._text import decode
from .variants import variant_options, variants

if TYPE_CHECKING:
    from ..evaluation.perplexity import Perplexity


@click.command("perplexity", short_help="Perplexity of a text after a prompt.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A UTF-8 text file, such as WikiText-2's test split.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    multiple=True,
    default=(512,),
    show_default=True,
    metavar="P",
    help="Tokens that the full model reads and experts are chosen from. Give several to compare.",
)
@click.option(
    "--continue-tokens",
    type=click.IntRange(1),
    multiple=True,
    default=(256,),
    show_default=True,
    metavar="G",
    help="Tokens after them that are predicted. Give several to compare.",
)
@click.option(
    "--windows", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Pieces of text to measure."
)
@click.option(
    "--bos",
    is_flag=True,
    help="Put the model's first token (<bos>, <s>) before every prompt, uncounted. Without it the windows have none, "
    "which some models (Gemma) predict much worse from.",
)
@variant_options
@click.option(
    "--prior",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Scores of other texts, as `griffin export-pruned --prior-out` saves them, beside the prompt's own.",
)
@click.option(
    "--prior-weight",
    "prior_weights",
    type=click.FloatRange(0, 1),
    multiple=True,
    metavar="W",
    help="Of the prior: 0 the prompt's choice alone, 1 the prior's. Give several to compare. [default: 0.4]",
)
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    *,
    data: Path,
    prompt_tokens: tuple[int, ...],
    continue_tokens: tuple[int, ...],
    windows: int,
    bos: bool,
    prior: Path | None,
    prior_weights: tuple[float, ...],
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
    **compared: Any,
) -> None:
    """Perplexity of a text after a prompt from the same text.

    The text is cut into windows of P + G tokens, back to back. The full model reads the first P; the rest is predicted
    by the experts that they chose, its first token by the full model. With several P or G, all combinations are
    measured at the same places: windows are as long as the largest, and the prompts end where the largest ends.
    """
    if prior_weights and prior is None:
        raise click.UsageError("--prior-weight needs --prior FILE")
    chosen = variants(**compared)
    text = decode(data.read_bytes(), str(data))
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    from ..evaluation import perplexity
    from ..evaluation.scoring.variant import with_prior

    if prior is not None:
        chosen = with_prior(engine, chosen, prior, prior_weights)
    ids, before = perplexity.encode_text(engine, text, bos=bos)
    pairs = perplexity.windows(ids, max(prompt_tokens), max(continue_tokens), windows)
    with console.layer_progress() as on_layer:
        results = perplexity.perplexity(
            engine,
            pairs,
            chosen,
            prompt_tokens=prompt_tokens,
            continue_tokens=continue_tokens,
            before=before,
            on_layer=on_layer,
        )
    grid = len(results) > len(chosen)
    if as_json:
        facts = {
            "model": engine.name,
            "model_path": str(engine.path),
            "data": str(data),
            "prompt_tokens": list(prompt_tokens) if grid else prompt_tokens[0],
            "continue_tokens": list(continue_tokens) if grid else continue_tokens[0],
            "windows": windows,
            "results": [to_json(result, grid) for result in results],
        }
        click.echo(json.dumps(facts))
        return
    title = f"{engine.name}, {engine.dtype}, {windows} windows of {data.name}"
    columns = ("prompt", "then", "pruned", "perplexity", "± of its log", "agreement", "KL (nats)", "resident")
    console.table(title, columns, [cells(result) for result in results])


def to_json(result: "Perplexity", grid: bool) -> dict[str, Any]:
    """The lengths stand with each result only where they differ."""
    facts = result.to_json()
    return facts if grid else {name: facts[name] for name in facts if name not in ("prompt_tokens", "continue_tokens")}


def cells(result: "Perplexity") -> tuple[str, ...]:
    return (
        f"{result.prompt_tokens}",
        f"{result.continue_tokens}",
        result.label,
        f"{result.perplexity:.2f}" if result.perplexity < 10_000 else f"{result.perplexity:.3g}",
        f"{result.standard_error:.3f}",
        f"{result.agreement:.3f}",
        f"{result.kl:.4f}",
        format_bytes(result.resident_bytes),
    )
