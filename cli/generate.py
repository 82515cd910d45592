"""`griffin generate`: answer one prompt, or a file of them. The answer streams to stdout, the rest goes to stderr."""

import json
from pathlib import Path
from typing import Any

import click

from . import _console as console
from ._options import (
    answer_options,
    check_skip_usage,
    choice_note,
    host_memory_option,
    model_options,
    open_engine,
    prompt_form,
    prompt_form_options,
    remember,
    settings,
)
from ._text import read_prompt
from .generate_many import generate_many


@click.command("generate", short_help="Answer one prompt, or a file of them.")
@click.option("--prompt", metavar="TEXT", help="The prompt. Without it and --prompt-file, it is read from a pipe.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@prompt_form_options
@model_options
@host_memory_option
@answer_options
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Many prompts: a JSONL file of {"prompt": ...} or {"messages": [...]}.',
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --input: the JSONL file of answers. After a stop, the same command goes on where it was.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="With --input: prompts that share one reading of the model, and one expert set.",
)
@click.option(
    "--per-prompt", is_flag=True, help="With --batch-size: an expert set for each prompt, as if it were alone."
)
@click.option("--force", is_flag=True, help="Start --output again, whatever it holds.")
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
    host_memory: str,
    dtype: str | None,
    source: Path | None,
    output: Path | None,
    batch_size: int,
    per_prompt: bool,
    force: bool,
    as_json: bool,
    **answer: Any,
) -> None:
    """Answer one prompt, or a file of them.

    The model is read once, for the prompt; the answer comes from the neurons that the prompt uses.
    """
    system = prompt_form(system, raw)
    check_skip_usage(**answer)
    chosen = settings(**answer)
    place: dict[str, Any] = {
        "model": model,
        "device": device,
        "device_memory": device_memory,
        "host_memory": host_memory,
        "dtype": dtype,
    }
    if (source is None) != (output is None):
        raise click.UsageError("--input and --output go together")
    if source is not None and output is not None:
        if prompt is not None or prompt_file is not None:
            raise click.UsageError("--input gives the prompts: leave out --prompt and --prompt-file")
        generate_many(
            source,
            output,
            chosen,
            system=system,
            raw=raw,
            batch_size=batch_size,
            per_prompt=per_prompt,
            force=force,
            as_json=as_json,
            **place,
        )
        return
    if batch_size > 1 or per_prompt or force:
        raise click.UsageError("--batch-size, --per-prompt and --force need --input and --output")
    text = read_prompt(prompt, prompt_file)
    engine = open_engine(**place)
    ids = engine.encode(text, system=system, raw=raw)
    if chosen.sparsity is None:
        how = {name: getattr(chosen, name) for name in ("allocation", "resident_dtype", "rest")}
        plan = engine.plan(len(ids), chosen.max_new_tokens, skip=chosen.skip(), **how)
        if note := choice_note(chosen, plan, engine.dtype):
            console.note(note)
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
