"""`griffin export-pruned`: the model, pruned for a prompt, as a folder that transformers loads or a GGUF file."""

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import click

from ..chat import Settings
from ..choices import EXPORT_FORMATS, GGUF_TYPES
from ..errors import PromptError
from ..units import format_bytes
from . import console
from .options import (
    SHARES,
    check_skip_usage,
    check_text,
    expert_options,
    model_options,
    open_engine,
    prompt_form,
    prompt_form_options,
    read_file,
    read_prompt,
    skip_options,
)


@click.command("export-pruned", short_help="Write the pruned model, for transformers or for llama.cpp.")
@click.option("--prompt", metavar="TEXT|FILE", help="The prompt, or the name of a file that has it.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@click.option(
    "--out",
    required=True,
    metavar="FOLDER|FILE.gguf",
    type=click.Path(path_type=Path),
    help="What to write: a folder, new or empty; or, with --format gguf, a new file.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option(
    "--format",
    "form",
    type=click.Choice(EXPORT_FORMATS),
    default="safetensors",
    show_default=True,
    help="A folder that transformers loads, or a file that llama.cpp runs.",
)
@click.option(
    "--gguf-type",
    type=click.Choice(GGUF_TYPES),
    help="Of the matrices in a GGUF file; vectors are f32. [default: bf16]",
)
@click.option(
    "--multiple-of",
    type=click.IntRange(1),
    metavar="N",
    help="Keep a multiple of N neurons in every layer, rounded up. llama.cpp's K-quants want 256. "
    "[default: 1; for GGUF 32]",
)
@click.option(  # of generate: refused here, with the way out
    "--resident-dtype", "--rest", "packed", hidden=True, help="Not of an export: see --gguf-type."
)
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
@skip_options
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
    form: str,
    gguf_type: str | None,
    multiple_of: int | None,
    packed: str | None,
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
    **skip: Any,
) -> None:
    """Write the model, pruned for a prompt: a folder that transformers loads, or a file that llama.cpp runs.

    Give a prompt like the ones that the pruned model shall answer: the neurons that it does not use are gone.
    """
    _check_form(form, out, gguf_type, packed)
    system = prompt_form(system, raw)
    check_skip_usage(**skip)
    if skip["ffn_skip"] and skip["ffn_skip_mode"] == "token":
        raise click.UsageError("an export has no tokens to skip for: --ffn-skip needs --ffn-skip-mode prompt")
    chosen = Settings(sparsity=sparsity, **skip)  # refused here, before the model is looked for
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
            skip=chosen.skip(),
            seed=seed,
            force=force,
            format=form,
            gguf_type=gguf_type or "bf16",
            multiple_of=multiple_of,
            on_layer=on_layer,
            prompt_text=text,
        )
    seconds = time.perf_counter() - start
    if as_json:
        click.echo(json.dumps({"model": engine.name, "sparsity": sparsity, **export.to_json(), "seconds": seconds}))
    else:
        click.echo(str(export.path))
    if export.backup:
        console.note(f"what was there before is now in {export.backup}")
    if export.skipped:
        layers = ", ".join(map(str, export.skipped))
        console.note(
            f"{len(export.skipped)} blocks are left out, of layers {layers}: they are zeros in the file, and in"
        )
        console.note("  memory, since a config has one width for all layers")
    full, size = format_bytes(engine.sizes.full), format_bytes(export.bytes)
    files = f"{len(export.files)} files" if len(export.files) > 1 else "one file"
    console.note(f"{size} in {files}, of a model of {full}; written in {seconds:.1f} s. To load it:")
    if form == "gguf":
        console.note(f"  llama-cli -m {shlex.quote(str(export.path))}")
    else:
        console.note(f"  AutoModelForCausalLM.from_pretrained({str(export.path)!r})")


def _check_form(form: str, out: Path, gguf_type: str | None, packed: str | None) -> None:
    """Raises click.UsageError for options that do not go together."""
    if packed is not None:
        raise click.UsageError(
            "an export holds no neurons in --resident-dtype or --rest formats: it is written in --dtype, or as "
            "--format gguf --gguf-type q8_0; llama.cpp's llama-quantize makes smaller types of a GGUF file"
        )
    if form != "gguf" and gguf_type is not None:
        raise click.UsageError("--gguf-type is for --format gguf")
    if form != "gguf" and out.suffix.lower() == ".gguf":
        raise click.UsageError(f"{out} would be a folder of safetensors: add --format gguf, or give another name")


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
