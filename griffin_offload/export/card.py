"""The model card and griffin.json of an exported checkpoint."""

import json
from pathlib import Path
from typing import Any

from ..pruning.selection import Selection
from ..pruning.statistic import STATISTICS
from ..sources.catalogue import CATALOGUE
from ..units import format_bytes
from ..version import __version__
from .pruned_model import ExportJob, ExportSource
from .publish import FACTS


def write_card(job: ExportJob, folder: Path, kept_neurons: list[Any]) -> None:
    """README.md of an export, then griffin.json, which lists all files: `kept_neurons` by layer, as lists."""
    plan, selection, source = job.plan, job.selection, job.source
    neurons = plan.layers[0].neurons
    kept = [layer.kept for layer in plan.layers]
    skipped = [i for i, layer in enumerate(plan.layers) if plan.skip and not layer.kept]
    some = [k for i, k in enumerate(kept) if i not in skipped] or kept
    facts = {
        "griffin_offload": __version__,
        "method": source.method(selection),
        "seed": selection.seed,
        "source_model": source.name,
        "model_type": job.layout.config.model_type,
        "sparsity": plan.sparsity,
        "neurons": neurons,
        "kept": kept[0] if len(set(kept)) == 1 else kept,
        "dtype": job.dtype,
        **source.facts(selection),
        "experts": kept_neurons,
    }
    if plan.fold:
        facts |= {"fold": plan.fold}
    if plan.skip:
        facts |= {"ffn_skip": plan.skip.share, "skipped_layers": skipped}
    known = CATALOGUE.get(source.name.lower())  # an alias is ours alone
    card = CARD.format(
        model=source.name,
        known=f" ({known.hub_id} on the hub, {known.licence})" if known else "",
        sparsity=plan.sparsity,
        kept=some[0] if len(set(some)) == 1 else f"{min(some)} to {max(some)}",
        skipped=SKIPPED.format(layers=", ".join(map(str, skipped))) if skipped else "",
        neurons=neurons,
        resident=format_bytes(plan.resident_bytes),
        full=format_bytes(plan.full_bytes),
        fold=FOLD.format(on="that text" if source.calibration else "that prompt") if plan.fold else "",
        **_words(source, selection),
    )
    (folder / "README.md").write_text(card)
    facts["request"] = job.request
    facts["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / FACTS).write_text(json.dumps(facts) + "\n")


def _words(source: ExportSource, selection: Selection) -> dict[str, str]:
    """What a card says of how the neurons were chosen."""
    facts = source.facts(selection)
    if source.calibration is None:
        weight = facts["prior"]["weight"] if selection.prior else 0.0
        prior = f", and by a prior (`prior` in `griffin.json`, weight {weight:.2g})"
        return {
            "to": "to one prompt",
            "method": STATISTICS["griffin"].title,
            "by": f"by one prompt of {facts['prompt_tokens']} tokens" + (prior if selection.prior else ""),
            "texts": f"- prompt, SHA-256 of its text: `{facts['prompt_sha256']}`",
            "use": PROMPT_USE,
        }
    facts = facts["calibration"]
    lines = [
        f"- calibration text `{of['file']}`: {of['samples']} samples of the form {of['form']}, {of['tokens']} tokens, "
        f"share {of['share']:g}; SHA-256 `{of['sha256']}`"
        for of in facts.get("texts", [])
    ]
    measured = f"measured on {facts['samples']} samples of text, {facts['tokens']} tokens"
    return {
        "to": "for any prompt",
        "method": source.calibration.statistic.title,
        "by": f"by their score `{facts['score']}`" + (f", {measured}" if facts["samples"] else ""),
        "texts": "\n".join([*lines, f"- seed: {facts['seed']}"]),
        "use": STATIC_USE,
    }


FOLD = """ Their columns in the down projections
took over, by ridge regression, what the dropped ones gave {on} (`fold` in `griffin.json`)."""
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

Derived by Griffin Offload from `{model}` with {method}: {kept} of the {neurons} feed-forward neurons
of every layer are kept (sparsity {sparsity:g}), chosen {by}.{fold} {resident} instead of {full}.

- source model: `{model}`{known}, whose licence applies to these weights too
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
