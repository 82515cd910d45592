"""`griffin eval perplexity`: how well the pruned model predicts a text after a prompt from that text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..options import AUTO, OFF
from ..units import format_bytes
from . import _console as console
from ._flags import count, file, json_option, several, switch
from ._opening import opens_engine
from ._options import compares, option, repeated
from ._print import echo
from ._text import read_file

if TYPE_CHECKING:
    from ..engine import Engine
    from ..evaluation.perplexity import Perplexity
    from ..evaluation.scoring.variant import Variant


PROMPT_TOKENS = "Tokens that the full model reads and the kept neurons are chosen from."
CONTINUE_TOKENS = "Tokens after them that are predicted."


@click.command("perplexity", short_help="Perplexity of a text after a prompt.")
@file("--data", "A UTF-8 text file, such as WikiText-2's test split.", required=True)
@several("--prompt-tokens", "prompts", (512,), PROMPT_TOKENS, type=click.IntRange(1), metavar="P")
@several("--continue-tokens", "continuations", (256,), CONTINUE_TOKENS, type=click.IntRange(1), metavar="G")
@count("--windows", 8, "Pieces of text to measure.")
@switch(
    "--bos",
    "Put the model's first token (<bos>, <s>) before every prompt, uncounted. Without it some models (Gemma) "
    "predict much worse.",
)
@compares
@option("prior")
@repeated("prior_weight", "prior_weights", type=click.FloatRange(0, 1))
@opens_engine()
@json_option()
def command(
    *,
    data: Path,
    windows: int,
    prior: str | None,
    prior_weights: tuple[float, ...],
    variants: "list[Variant]",
    open_engine: Callable[[], "Engine"],
    as_json: bool,
    **lengths: Any,
) -> None:
    """Perplexity of a text after a prompt from the same text.

    The text is cut into windows of P + G tokens, back to back. The full model reads the first P tokens and predicts the
    next one; the pruned model predicts the rest, with the neurons that the P tokens chose. With several P or G, all
    combinations are measured at the same places: windows have the largest size, and all prompts end at the same token.
    """
    if prior_weights and prior == OFF:
        raise click.UsageError("--prior-weight needs --prior auto, or a file")
    prompt_tokens, continue_tokens = lengths["prompts"], lengths["continuations"]
    text = read_file(str(data))
    engine = open_engine()
    from ..evaluation import perplexity
    from ..evaluation.scoring.variant import with_prior

    if prior is not None or prior_weights:
        variants = with_prior(engine, variants, prior or AUTO, prior_weights)
    ids, before = perplexity.encode_text(
        engine, text, bos=lengths["bos"], most=windows * (max(prompt_tokens) + max(continue_tokens))
    )
    pairs = perplexity.windows(ids, max(prompt_tokens), max(continue_tokens), windows)
    with console.layer_progress() as on_layer:
        results = perplexity.perplexity(
            engine,
            pairs,
            variants,
            prompt_tokens=prompt_tokens,
            continue_tokens=continue_tokens,
            before=before,
            on_layer=on_layer,
        )
    grid = len(results) > len(variants)
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
        echo(json.dumps(facts))
        return
    title = f"{engine.name}, {engine.dtype}, {windows} windows of {data.name}"
    columns = (
        "prompt",
        "then",
        "pruned",
        "perplexity",
        "± of its log",
        "agreement",
        "KL (nats)",
        "acceptance",
        "resident",
    )
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
        f"{result.acceptance:.3f}",
        format_bytes(result.resident_bytes),
    )
