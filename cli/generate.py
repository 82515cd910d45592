"""`griffin generate`: answer one prompt. The answer streams to stdout; progress and report go to stderr."""

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import GriffinError
from . import console
from .options import answer_options, check_text, model_options, open_engine, read_prompt, settings

if TYPE_CHECKING:
    from ..report import Report

WHOLE = "the whole model fits the device: no offloading needed; nothing is pruned (use --sparsity to prune)"


@click.command("generate", short_help="Answer one prompt.")
@click.option("--prompt", metavar="TEXT", help="The prompt. Without it and --prompt-file, it is read from a pipe.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@click.option("--system", metavar="TEXT", help="What the model is told before the prompt.")
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template.")
@model_options
@answer_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(
    *,
    prompt: str | None,
    prompt_file: str | None,
    system: str | None,
    raw: bool,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
    **answer: Any,
) -> None:
    """Answer one prompt.

    The model is read once, for the prompt; the answer comes from the neurons that the prompt uses.
    """
    if raw and system is not None:
        raise click.UsageError("--raw leaves out the chat template, and --system needs it: leave one out")
    chosen = settings(**answer)
    text = read_prompt(prompt, prompt_file)
    system = check_text(system, "--system") if system is not None else None
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    ids = engine.encode(text, system=system, raw=raw)
    if chosen.sparsity is None and engine.plan(len(ids), chosen.max_new_tokens).fits_whole:
        console.note(WHOLE)
    with console.layer_progress() as on_layer:
        show = None if as_json else stream
        generation = engine.generate(ids, on_text=show, on_layer=on_layer, **chosen.arguments())
    click.echo(json.dumps(generation.to_json()) if as_json else "")
    console.report(generation.report)
    remember(generation.report)
    if generation.finish_reason == "interrupted":
        raise KeyboardInterrupt


def stream(text: str) -> None:
    """Text to stdout, at once."""
    click.echo(text, nl=False)  # echo flushes


def remember(report: "Report") -> None:
    """Keep the report for `griffin mem-report --last`. A cache that cannot be written is no reason to fail."""
    from ..models import cache_folder
    from ..report import save_last

    try:
        save_last(report, cache_folder())
    except (OSError, GriffinError) as error:
        console.note(f"the report is not kept for mem-report --last: {error}")
