"""How many of a resident model's drafts the full model accepts, for each way to keep it: a table for docs/results.md.

    python scripts/acceptance_table.py --model smollm2-135m --model gemma-3-270m

Every prompt is answered losslessly with drafts as long as they may be, so that each failure is seen. A draft's
acceptance is the share of drafts that were the full model's own token, of those whose forerunners were."""

from typing import Any

import click

from griffin_offload import Engine
from griffin_offload.offload.draft_length import DraftLength
from griffin_offload.planning.lossless import DRAFTS

PROMPTS = (
    "Write a Python class LRUCache with get and put, a doubly linked list and a dict, and a few unit tests for it.",
    "Explain to a curious teenager how a vaccine teaches the immune system, in about four paragraphs.",
    "Translate into German, sentence by sentence: The harbour was quiet. Two boats came in at dawn. Nobody waited.",
)


@click.command()
@click.option("--model", "models", multiple=True, required=True)
@click.option("--tokens", default=96)
def main(models: tuple[str, ...], tokens: int) -> None:
    DraftLength.goes_on = lambda *_: True  # type: ignore[method-assign]
    print("| model | resident | acceptance (worst prompt) | sampled at temperature 1 |", "|---|---|---|---|", sep="\n")
    for model in models:
        engine = Engine(model)
        for draft in (each for each in DRAFTS if each.rest != "drop" or not each.sparsity):
            kept: dict[str, Any] = {
                "sparsity": draft.sparsity,
                "resident_dtype": draft.resident_dtype,
                "rest": draft.rest,
            }
            cells = []
            how: dict[str, Any]
            for how in ({"greedy": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}):
                shares = []
                for prompt in PROMPTS:
                    ids = engine.encode(prompt)
                    report = engine.generate(ids, lossless=True, max_new_tokens=tokens, **kept, **how).report
                    assert report.lossless
                    shares.append((report.lossless.accepted, report.lossless.failed))
                good, bad = (sum(each) for each in zip(*shares, strict=True))
                cells.append(f"{good / (good + bad):.3f} ({min(g / max(1, g + b) for g, b in shares):.3f})")
            named = (
                f"{draft.resident_dtype}, {draft.sparsity:.0%} {draft.rest}" if draft.sparsity else draft.resident_dtype
            )
            print(f"| {model} | {named} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
