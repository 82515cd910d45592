"""`griffin export-pruned`: the model, pruned for a prompt, as a folder that plain transformers loads."""

import json
import os
import time
from pathlib import Path

import click

from ..chat import Settings
from ..errors import PromptError
from ..units import format_bytes
from . import console
from .options import (
    SHARES,
    check_text,
    expert_options,
    model_options,
    open_engine,
    prompt_form,
    prompt_form_options,
    read_file,
    read_prompt,
)


@click.command("export-pruned", short_help="Write the pruned model as a folder that transformers loads.")
@click.option("--prompt", metavar="TEXT|FILE", help="The prompt, or the name of a file that has it.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The folder to write. It must not exist, or be empty.",
)
@click.option("--force", is_flag=True, help="Replace what the folder holds.")
@prompt_form_options
@click.option(
    "--sparsity",
    type=SHARES,
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of the feed-forward neurons to drop, 0 to 1; or one for each layer: 0.2,0.5,... or a file of them.",
)
@expert_options
@click.option(
    "--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of the selections that draw. [default: 0]"
)
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    *,
    prompt: str | None,
    prompt_file: str | None,
    out: Path,
    force: bool,
    system: str | None,
    raw: bool,
    sparsity: float | tuple[float, ...],
    selection: str,
    allocation: str,
    seed: int,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Write the model, pruned for a prompt, as a folder that transformers loads.

    Give a prompt like the ones that the pruned model shall answer: the neurons that it does not use are gone.
    """
    system = prompt_form(system, raw)
    Settings(sparsity=sparsity)  # refused here, before the model is looked for
    text = file_or_text(prompt) if prompt is not None and prompt_file is None else read_prompt(prompt, prompt_file)
    engine = open_engine(model, device=device, device_memory=device_memory, dtype=dtype)
    ids = engine.encode(text, system=system, raw=raw)
    start = time.perf_counter()
    with console.layer_progress("Reading and writing") as on_layer:
        export = engine.export(
            ids,
            out,
            sparsity=sparsity,
            selection=selection,
            allocation=allocation,
            seed=seed,
            force=force,
            on_layer=on_layer,
            prompt_text=text,
        )
    seconds = time.perf_counter() - start
    if as_json:
        click.echo(json.dumps({"model": engine.name, "sparsity": sparsity, **export.to_json(), "seconds": seconds}))
    else:
        click.echo(str(export.path))
    if export.backup:
        console.note(f"what the folder held before is now in {export.backup}")
    full, size = format_bytes(engine.sizes.full), format_bytes(export.bytes)
    console.note(f"{size} in {len(export.files)} files, of a model of {full}; written in {seconds:.1f} s. To load it:")
    console.note(f"  AutoModelForCausalLM.from_pretrained({str(export.path)!r})")


def file_or_text(prompt: str) -> str:
    """The prompt is a file's name or the text itself; says on stderr which. Raises PromptError."""
    if os.path.isfile(prompt):
        console.note(f"prompt: the text in the file {prompt}")
        text = read_file(prompt)
    else:
        console.note("prompt: the text given with --prompt (no file has this name)")
        text = check_text(prompt, "the prompt")
    if not text.strip():
        raise PromptError("the prompt is empty: give it some text")
    return text
