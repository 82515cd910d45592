"""`griffin export-pruned`: the model, pruned for a prompt or by calibration texts, as a folder that transformers loads
or a GGUF file; or the scores of those texts alone."""

import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import PromptError
from ..options import AUTO, OFF, ExportFormat, OnLayer, Pruning
from ..paths import expand
from ..units import format_bytes
from . import _console as console
from ._calibration import CalibrationOptions, takes_calibration
from ._flags import file, json_option, switch
from ._opening import opens_engine
from ._options import Some, takes
from ._outputs import check_outputs
from ._print import echo
from ._text import check_text, looks_like_a_file, read_file, read_prompt, refuse_missing_file, takes_form

if TYPE_CHECKING:
    from ..engine import Engine
    from ..export.pruned_model import Export

REST = (
    "The neurons that are not chosen are left out, as in the GRIFFIN paper; with auto too, since a file holds all "
    "neurons of a layer in one format. int8 and int4 are refused."
)
SPARSITY = "Share of the feed-forward neurons to drop, 0 to 1; or one for each layer: 0.2,0.5,... or a file of them."


@click.command("export-pruned", short_help="Write the pruned model, for transformers or for llama.cpp.")
@click.option("--prompt", metavar="TEXT|FILE", help="The prompt, or the name of a file that has it.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@takes_form
@file("--out", "What to write: a folder, new or empty; or, with --format gguf, a new file.", metavar="FOLDER|FILE.gguf")
@switch("--force", "Replace what is there.")
@takes(
    ExportFormat,
    Some(
        Pruning,
        without=("resident_dtype",),
        defaults={"sparsity": 0.5},
        helps={"sparsity": SPARSITY, "rest": REST},
    ),
)
@click.option("--resident-dtype", "packed", hidden=True, help="Not for an export: see --gguf-type.")
@takes_calibration
@opens_engine()
@json_option("Print one JSON object.")
def command(
    *,
    out: Path | None,
    force: bool,
    pruning: Pruning,
    export_format: ExportFormat,
    open_engine: Callable[[], "Engine"],
    as_json: bool,
    packed: str | None,
    **more: Any,
) -> None:
    """Write the model, pruned for a prompt: a folder that transformers loads, or a file that llama.cpp runs.

    Give a prompt like those that the pruned model will answer: neurons that it does not use are removed. Or give
    --calibration texts: one reading of the model then scores the neurons over all of them.
    """
    prompt, prompt_file, form = (more.pop(name) for name in ("prompt", "prompt_file", "form"))
    options = CalibrationOptions(**more)
    check_outputs("out", "prior_out")
    if out is None and options.prior_out is None:
        raise click.UsageError("Missing option '--out': what to write (or --prior-out, for the scores alone)")
    check_format(export_format, out, packed or (pruning.rest if pruning.rest not in (None, AUTO, "drop") else None))
    if pruning.skip.share and not pruning.skip.by_prompt:
        raise click.UsageError("an export has no tokens to skip for: --ffn-skip needs --ffn-skip-mode prompt")
    given = {"--prompt": prompt is not None, "--prompt-file": prompt_file, "--system": form.system, "--raw": form.raw}
    given |= {
        "--prior": pruning.prior != AUTO,
        "--selection": pruning.selection != "topk",
        "--ffn-skip": pruning.skip.share,
    }
    options.refuse(given)
    # Files are read, and refused, before a model is looked for.
    if pruning.prior not in (AUTO, OFF):
        from ..pruning.prior import load_prior

        pruning = replace(pruning, prior=load_prior(expand(pruning.prior)))
    writing: tuple[Any, ...] = (out, pruning, export_format)
    if options.asked:
        engine, export, told, start = by_texts(options, open_engine, writing, force)
    else:
        text = file_or_text(prompt) if prompt is not None and prompt_file is None else read_prompt(prompt, prompt_file)
        engine = open_engine()
        ids = form.encode(engine, text)
        start = time.perf_counter()
        more = {"prompt_text": text, "seed": options.seed, "force": force}
        export = written(lambda on_layer: engine.export(ids, *writing, **more, on_layer=on_layer))
        told = {"model": engine.name, "path": str(out)}
    if export is None:
        echo(json.dumps(told) if as_json else str(out or options.prior_out))
        return
    seconds = time.perf_counter() - start
    told = {"model": engine.name, "sparsity": pruning.sparsity, **export.to_json(), "seconds": seconds}
    echo(json.dumps(told) if as_json else str(export.path))
    tell(export, export_format, engine.sizes.full, seconds)


def by_texts(
    options: CalibrationOptions, open_engine: "Callable[[], Engine]", writing: tuple[Any, ...], force: bool
) -> "tuple[Engine, Export | None, dict[str, Any], float]":
    """Exports by calibration texts, or saves their scores alone: the engine, what was exported, what to tell where
    nothing was, and when it began."""
    out, sources, before = writing[0], options.sources(), options.check_prior_out(force)
    engine = open_engine()
    calibration = options.draw(engine, sources)
    saved = options.is_saved(engine, calibration, before)
    start, room = time.perf_counter(), options.host_memory

    def export_static(on_layer: OnLayer) -> "Export":
        export, scores = engine.export_static(calibration, *writing, force=force, host_memory=room, on_layer=on_layer)
        if not saved:
            options.save(scores, force)
        return export

    export = None if out is None else written(export_static)
    if export is None:
        if not saved and options.prior_out is not None:
            with console.layer_progress("Reading") as on_layer:
                options.save(engine.score_samples(calibration, on_layer, host_memory=room), force)
        elif out is None:
            console.note(f"{options.prior_out} is there already; --force measures it again")
    path = str(out or options.prior_out)
    return engine, export, {"model": engine.name, "path" if out else "prior": path, **calibration.to_json()}, start


def written(export: "Callable[[OnLayer], Export]") -> "Export | None":
    """What is exported; None, and a note, where it is there already."""
    from ..export.publish import AlreadyThere

    try:
        with console.layer_progress("Reading and writing") as on_layer:
            return export(on_layer)
    except AlreadyThere as there:
        console.note(str(there))
        return None


def tell(export: "Export", export_format: ExportFormat, full_bytes: int, seconds: float) -> None:
    """What was written, and how to load it."""
    if export.backup:
        console.note(f"the previous content is now in {export.backup}")
    if export.rest and export.rest["why"] != "as asked":
        console.note(f"the rest is dropped: {export.rest['why']}")
    if export.skipped:
        layers = ", ".join(map(str, export.skipped))
        console.note(
            f"{len(export.skipped)} blocks are left out, of layers {layers}: they are zeros in the file, and in"
        )
        console.note("  memory, since a config has one width for all layers")
    files = f"{len(export.files)} files" if len(export.files) > 1 else "one file"
    size = f"{format_bytes(export.bytes)} in {files}, of a model of {format_bytes(full_bytes)}"
    console.note(f"{size}; written in {seconds:.1f} s. To load it:")
    if export_format.format == "gguf":
        console.note(f"  llama-cli -m {shlex.quote(str(export.path))}")
    else:
        console.note(f"  AutoModelForCausalLM.from_pretrained({str(export.path)!r})")


def check_format(export_format: ExportFormat, out: Path | None, packed: str | None) -> None:
    """Raises click.UsageError for options that do not go together."""
    gguf = export_format.format == "gguf"
    if packed is not None:
        raise click.UsageError(
            "an export has no --resident-dtype or --rest: it is written in --dtype, or with "
            "--format gguf --gguf-type q8_0; llama.cpp's llama-quantize makes smaller types of a GGUF file"
        )
    if not gguf and export_format.gguf_type is not None:
        raise click.UsageError("--gguf-type needs --format gguf")
    if not gguf and out is not None and out.suffix.lower() == ".gguf":
        raise click.UsageError(f"{out} would be a folder of safetensors: add --format gguf, or give another name")


def file_or_text(prompt: str) -> str:
    """The prompt is a file's name or the text itself; says on stderr which. Raises PromptError."""
    refuse_missing_file(prompt, "--prompt", "give --prompt the name of a file, or a text")
    if os.path.isfile(prompt) or (looks_like_a_file(prompt) and os.path.exists(prompt)):
        console.note(f"prompt: the text in the file {prompt}")
        text = read_file(prompt)
    else:
        console.note("prompt: the text given with --prompt (no file has this name)")
        text = check_text(prompt, "the prompt")
    if not text.strip():
        raise PromptError("the prompt is empty: give it some text")
    return text
