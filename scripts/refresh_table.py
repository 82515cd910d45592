"""What `--refresh N` does to a long answer: how likely the full model finds it, with and without.

    python scripts/refresh_table.py --model smollm2-135m --model gemma-3-270m

Each prompt is answered at temperature 1 with half of the neurons dropped. The full model (plain transformers) then
reads prompt and answer: its mean loss over the answer's tokens, by quarters, and the share that are its likeliest. The
first row is the full model's own answer: what comes close to it is good, in either direction."""

from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM

from griffin_offload import Engine

PROMPTS = (
    "Write a long story about a lighthouse keeper who finds a map, and what she does with it.",
    "Explain, step by step and in detail, how a bicycle works, from the pedals to the brakes.",
    "Describe a day in a medieval town: the market, the workshops, the church, the evening.",
)


@click.command()
@click.option("--model", "models", multiple=True, required=True)
@click.option("--tokens", default=256)
def main(models: tuple[str, ...], tokens: int) -> None:
    print("| model | refresh | loss by quarters of the answer | the full model's own tokens | seconds of passes |")
    print("|---|---|---|---|---|")
    for model in models:
        engine = Engine(model)
        full = AutoModelForCausalLM.from_pretrained(engine.opened.path, dtype=torch.bfloat16).eval()
        for sparsity, every in ((0.0, None), (0.5, None), (0.5, 128), (0.5, 32)):
            losses, own, seconds = [], [], 0.0
            for prompt in PROMPTS:
                ids = engine.encode(prompt)
                how: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "refresh": every}
                answer = engine.generate(
                    ids, sparsity=sparsity, rest="drop", max_new_tokens=tokens, min_new_tokens=tokens, **how
                )
                seconds += answer.report.refreshes.seconds if answer.report.refreshes else 0.0
                text = torch.tensor([[*ids, *answer.token_ids]])
                with torch.no_grad():
                    logits = full(text).logits[0, len(ids) - 1 : -1].float()
                told = text[0, len(ids) :]
                losses.append(torch.nn.functional.cross_entropy(logits, told, reduction="none"))
                own.append((logits.argmax(-1) == told).float())
            quarters = torch.stack(losses).mean(0).chunk(4)
            by_quarter = ", ".join(f"{quarter.mean():.2f}" for quarter in quarters)
            how_often = every or ("never" if sparsity else "the full model")
            share = torch.stack(own).mean()
            print(f"| {model} | {how_often} | {by_quarter} | {share:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
