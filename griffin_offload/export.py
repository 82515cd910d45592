"""A pruned checkpoint that plain transformers loads, written layer by layer as the sweep passes.

All is written to a temporary folder beside the target, which is renamed at the end: an export is there whole, or not
at all.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import ExportError
from .plan import Plan, emptied, with_kept
from .pruned import METHODS, RESERVE, Export, Smaller, Source, smaller_model, write_pruned
from .selection import Selection
from .skeleton import Skeleton
from .stream import OnLayer
from .units import format_bytes
from .weights.reader import Reader
from .weights.writer import CheckpointWriter

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)


def export_checkpoint(
    skeleton: Skeleton,
    reader: Reader,
    plan: Plan,
    selection: Selection,
    source: Source,
    out: Path,
    force: bool,
    on_layer: OnLayer | None,
) -> Export:
    """Run the sweep over the samples and write what it keeps. Raises ExportError, CheckpointError, NumericError."""
    out = _real_path(out)
    smaller = smaller_model(skeleton, plan)
    needed = sum(torch.Size(shape).numel() for shape in smaller.shapes.values()) * skeleton.dtype.itemsize
    buffers = {name: buffer.dtype for name, buffer in skeleton.buffers.items()}
    with _new_folder(out, force, needed) as folder:
        with CheckpointWriter(folder, smaller.shapes, skeleton.dtype, others=buffers) as writer:
            written = write_pruned(skeleton, reader, plan, selection, source, smaller, writer, on_layer)
        plan = with_kept(plan, skeleton.sizes(), emptied(plan.kept, written.skipped))
        _write_config(_config(skeleton, smaller, source), source, folder)
        _write_card(skeleton, plan, selection, source, folder, written.experts)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        total = sum(path.stat().st_size for path in folder.iterdir())
        backup = _publish(folder, out)
    return Export(out, files, total, backup, written.scores, written.skipped)


def _config(skeleton: Skeleton, smaller: Smaller, source: Source) -> dict[str, Any]:
    """The exported config.json: the source's, with the sizes of what is kept."""
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text())
    config.pop("torch_dtype", None)
    dtype = str(skeleton.dtype).removeprefix("torch.")
    return config | smaller.sizes | {"dtype": dtype, "architectures": [type(skeleton.model).__name__]}


def _real_path(out: Path) -> Path:
    """Where links and dots lead: a link cannot be replaced by a folder, nor `.` be renamed."""
    try:
        if "\0" in str(out):
            raise ValueError
        return out.resolve()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link to itself, before Python 3.13
        raise ExportError(f"{str(out)!r} cannot be written: it is no name of a folder") from None


@contextmanager
def _new_folder(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """A temporary folder beside `out`, gone afterwards unless it was renamed. Raises ExportError for a bad `out`."""
    try:
        if out.exists() and not out.is_dir():
            raise ExportError(f"{out} is a file: give the name of a new folder")
        if out.is_dir() and any(out.iterdir()) and not force:
            raise ExportError(f"{out} exists and is not empty: give another folder, or --force to replace it")
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed + RESERVE:
            raise ExportError(
                f"{out.parent} has {format_bytes(free)} free; the export needs {format_bytes(needed + RESERVE)}"
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}") from None
    try:
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}; nothing was left behind") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> Path | None:
    """Rename the finished folder. An earlier export in its place is replaced; anything else is kept as a backup."""
    backup = None
    if out.is_dir() and any(out.iterdir()):
        backup = Path(tempfile.mkdtemp(prefix=f"{out.name}.backup-", dir=out.parent))
    try:
        if backup:
            out.replace(backup)
        folder.replace(out)
    except BaseException:
        if backup and not out.exists():
            backup.replace(out)
        elif backup:
            backup.rmdir()
        raise
    if backup and (backup / "griffin.json").exists():
        shutil.rmtree(backup)
        backup = None
    return backup


def _write_config(config: dict[str, Any], source: Source, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in COPIED:
        for path in source.path.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)


def _write_card(
    skeleton: Skeleton, plan: Plan, selection: Selection, source: Source, folder: Path, experts: list[Any]
) -> None:
    neurons = plan.layers[0].neurons
    kept = [layer.kept for layer in plan.layers]
    skipped = [i for i, layer in enumerate(plan.layers) if plan.skip and not layer.kept]
    some = [k for i, k in enumerate(kept) if i not in skipped] or kept
    facts = {
        "griffin_offload": __version__,
        "method": source.method(selection),
        "seed": selection.seed,
        "source_model": source.name,
        "model_type": skeleton.config.model_type,
        "sparsity": plan.sparsity,
        "neurons": neurons,
        "kept": kept[0] if len(set(kept)) == 1 else kept,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        **source.facts(selection),
        "experts": experts,
    }
    if plan.skip:
        facts |= {"ffn_skip": plan.skip.share, "skipped_layers": skipped}
    (folder / "griffin.json").write_text(json.dumps(facts) + "\n")
    card = CARD.format(
        model=source.name,
        sparsity=plan.sparsity,
        kept=some[0] if len(set(some)) == 1 else f"{min(some)} to {max(some)}",
        skipped=SKIPPED.format(layers=", ".join(map(str, skipped))) if skipped else "",
        neurons=neurons,
        resident=format_bytes(plan.resident_bytes),
        full=format_bytes(plan.full_bytes),
        **_words(source, selection),
    )
    (folder / "README.md").write_text(card)


def _words(source: Source, selection: Selection) -> dict[str, str]:
    """What a card says of how the neurons were chosen."""
    facts = source.facts(selection)
    if source.static is None:
        prior = f", and by a prior (`prior` in `griffin.json`, weight {selection.prior_weight:g})"
        return {
            "to": "to one prompt",
            "method": METHODS["griffin"],
            "by": f"by one prompt of {facts['prompt_tokens']} tokens" + (prior if selection.prior else ""),
            "texts": f"- prompt, SHA-256 of its text: `{facts['prompt_sha256']}`",
            "use": PROMPT_USE,
        }
    told = facts["calibration"]
    lines = [
        f"- calibration text `{of['file']}`: {of['samples']} samples of the form {of['form']}, {of['tokens']} tokens, "
        f"share {of['share']:g}; SHA-256 `{of['sha256']}`"
        for of in told.get("texts", [])
    ]
    measured = f"measured on {told['samples']} samples of text, {told['tokens']} tokens"
    return {
        "to": "for any prompt",
        "method": METHODS[told["score"]],
        "by": f"by their score `{told['score']}`" + (f", {measured}" if told["samples"] else ""),
        "texts": "\n".join([*lines, f"- seed: {told['seed']}"]),
        "use": STATIC_USE,
    }


SKIPPED = """- whole blocks left out, where the prompt saturates (FFN-SkipLLM, arXiv:2404.03865): of layers {layers},
  counted from 0. They are zeros here, since a config has one width for all layers
"""
CARD = """---
library_name: transformers
tags:
- griffin-offload
- pruned
---
# {model}, pruned {to}

Made by Griffin Offload from `{model}` with {method}: {kept} of the {neurons} feed-forward neurons
of every layer are kept (sparsity {sparsity:g}), chosen {by}. {resident} instead of {full}.

- source model: `{model}`, whose licence applies to these weights too
{texts}
- which neurons: `experts` in `griffin.json`, one list a layer
{skipped}
## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## What it is good for, and what not

{use}"""

PROMPT_USE = """For answering that prompt, and prompts much like it (the same document, the same style of task). It is a
special model: on other subjects, other languages and long reasoning it is worse than the source model, and small models
lose more than large ones. In Griffin itself the prompt is read by the full model and only the answer by the pruned one;
here the pruned model reads the prompt too.
"""

STATIC_USE = """For texts like those that it was calibrated with. One choice of neurons serves all prompts, so it loses
more than a choice by the prompt itself, which Griffin makes; on other subjects, other languages and long reasoning it
is worse than the source model, and small models lose more than large ones.
"""
