"""`griffin export-pruned`: the model, pruned for a prompt or by calibration texts, as a folder that transformers loads
or a GGUF file; or the scores of those texts alone."""

import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..chat import Settings
from ..errors import PromptError
from ..options import EXPORT_FORMATS, GGUF_TYPES
from ..units import format_bytes
from . import _console as console
from ._options import (
    SHARES,
    check_prior_options,
    check_skip_usage,
    expert_options,
    model_options,
    open_engine,
    prior_options,
    prompt_form,
    prompt_form_options,
    skip_options,
)
from ._text import check_text, read_file, read_prompt
from .calibration import CalibrationOptions, calibration_options

if TYPE_CHECKING:
    from ..engine import Engine
    from ..export.pruned_model import Export


@click.command("export-pruned", short_help="Write the pruned model, for transformers or for llama.cpp.")
@click.option("--prompt", metavar="TEXT|FILE", help="The prompt, or the name of a file that has it.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@calibration_options
@click.option(
    "--out",
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
@prior_options
@skip_options
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Seed of the samples, and of selections and scores that draw. [default: 0]",
)
@model_options
@click.option(
    "--host-memory",
    metavar="SIZE",
    help="RAM for calibration samples that wait for a layer; the others wait in a file beside --out. On the CPU, of "
    "what --device-memory leaves. [default: all of that]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    *,
    prompt: str | None,
    prompt_file: str | None,
    out: Path | None,
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
    prior: str | None,
    prior_weight: float | None,
    seed: int,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    host_memory: str | None,
    as_json: bool,
    **more: Any,
) -> None:
    """Write the model, pruned for a prompt: a folder that transformers loads, or a file that llama.cpp runs.

    Give a prompt like the ones that the pruned model shall answer: the neurons that it does not use are gone. Or give
    --calibration texts: the neurons are chosen by all of them, which one reading of the model measures.
    """
    skip = {name: more.pop(name) for name in list(more) if name.startswith("ffn_skip")}
    calibration = CalibrationOptions(seed=seed, host_memory=host_memory, **more)
    if out is None and calibration.prior_out is None:
        raise click.UsageError("Missing option '--out': what to write (or --prior-out, for the scores alone)")
    _check_form(form, out, gguf_type, packed)
    check_prior_options(prior, prior_weight)
    check_skip_usage(**skip)
    if skip["ffn_skip"] and skip["ffn_skip_mode"] == "token":
        raise click.UsageError("an export has no tokens to skip for: --ffn-skip needs --ffn-skip-mode prompt")
    of_a_prompt = {"--prompt": prompt is not None, "--prompt-file": prompt_file, "--system": system, "--raw": raw}
    calibration.refuse_with(
        {**of_a_prompt, "--prior": prior, "--selection": selection != "topk", "--ffn-skip": skip["ffn_skip"]}
    )
    place: dict[str, Any] = {"device": device, "device_memory": device_memory, "dtype": dtype}
    how: dict[str, Any] = {
        "sparsity": sparsity,
        "allocation": allocation,
        "force": force,
        "format": form,
        "gguf_type": gguf_type or "bf16",
        "multiple_of": multiple_of,
    }
    system = prompt_form(system, raw)
    # Refused here, before the model is looked for.
    chosen = Settings(sparsity=sparsity, prior=prior, prior_weight=prior_weight, **skip)
    if calibration.asked:
        sources = calibration.sources()
        calibration.check_prior_out(force)
        engine = open_engine(model, **place)
        static = calibration.draw(engine, sources)
        start = time.perf_counter()
        if out is None:
            with console.layer_progress("Reading") as on_layer:
                calibration.save(engine.score_samples(static, on_layer, host_memory=host_memory))
            path = str(calibration.prior_out)
            click.echo(json.dumps({"model": engine.name, "prior": path, **static.to_json()}) if as_json else path)
            return
        with console.layer_progress("Reading and writing") as on_layer:
            export, scores = engine.export_static(static, out, host_memory=host_memory, on_layer=on_layer, **how)
        calibration.save(scores)
    else:
        assert out is not None
        how |= chosen.prior_arguments() | {"skip": chosen.skip(), "selection": selection, "seed": seed}
        text = file_or_text(prompt) if prompt is not None and prompt_file is None else read_prompt(prompt, prompt_file)
        engine = open_engine(model, **place)
        ids = engine.encode(text, system=system, raw=raw)
        start = time.perf_counter()
        with console.layer_progress("Reading and writing") as on_layer:
            export = engine.export(ids, out, prompt_text=text, on_layer=on_layer, **how)
    _tell(engine, export, form, sparsity, time.perf_counter() - start, as_json)


def _tell(
    engine: "Engine", export: "Export", form: str, sparsity: float | tuple[float, ...], seconds: float, as_json: bool
) -> None:
    """What was written, and how to load it."""
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


def _check_form(form: str, out: Path | None, gguf_type: str | None, packed: str | None) -> None:
    """Raises click.UsageError for options that do not go together."""
    if packed is not None:
        raise click.UsageError(
            "an export holds no neurons in --resident-dtype or --rest formats: it is written in --dtype, or as "
            "--format gguf --gguf-type q8_0; llama.cpp's llama-quantize makes smaller types of a GGUF file"
        )
    if form != "gguf" and gguf_type is not None:
        raise click.UsageError("--gguf-type is for --format gguf")
    if form != "gguf" and out is not None and out.suffix.lower() == ".gguf":
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
