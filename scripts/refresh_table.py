"""What `--refresh N` does to a long answer: how likely the full model finds it, with and without.

    python scripts/refresh_table.py --model smollm2-135m --model gemma-3-270m

Each prompt is answered greedily with half of the neurons dropped. The full model (plain transformers) then reads prompt
and answer: its mean loss over the answer's tokens, and the share of them that it would have taken itself."""

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
@click.option("--tokens", default=384)
def main(models: tuple[str, ...], tokens: int) -> None:
    print("| model | refresh | loss by quarters of the answer | the full model's own tokens | seconds of passes |")
    print("|---|---|---|---|---|")
    for model in models:
        engine = Engine(model)
        full = AutoModelForCausalLM.from_pretrained(engine.opened.path, dtype=torch.bfloat16).eval()
        for every in (None, 128, 32):
            losses, own, seconds = [], [], 0.0
            for prompt in PROMPTS:
                ids = engine.encode(prompt)
                how = {"sparsity": 0.5, "rest": "drop", "greedy": True, "refresh": every}
                answer = engine.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **how)
                seconds += answer.report.refreshes.seconds if answer.report.refreshes else 0.0
                text = torch.tensor([[*ids, *answer.token_ids]])
                with torch.no_grad():
                    logits = full(text).logits[0, len(ids) - 1 : -1].float()
                told = text[0, len(ids) :]
                losses.append(torch.nn.functional.cross_entropy(logits, told, reduction="none"))
                own.append((logits.argmax(-1) == told).float())
            quarters = torch.stack(losses).mean(0).chunk(4)
            by_quarter = ", ".join(f"{quarter.mean():.2f}" for quarter in quarters)
            print(
                f"| {model} | {every or 'never'} | {by_quarter} | {torch.stack(own).mean():.2f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
