"""How well the fidelity that is measured on a prompt foretells that of its answer.

    python scripts/fidelity_table.py --model smollm2-135m --text wikitext2-test.txt \\
        --xsum xsum-1shot-200.jsonl --code griffin_offload/engine.py --out figures.jsonl
    python scripts/fidelity_table.py --show figures.jsonl --plot fidelity.png

The first writes a row for each (prompt, sparsity): figures on the last tokens of the prompt, and on the next 64 tokens
of the full model's own greedy answer, teacher-forced. Rows that are there already are not made again. The second prints
rank correlations, and the line that corrects the prompt's figure. Neurons are zeroed in a whole model in memory.

On the prompt two choices of neurons are compared: `seen` by all of its tokens, as an answer has them (what
griffin_offload/offload/fidelity_meter.py measures), and `unseen`, by the tokens before those that are read again."""

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.evaluation.figures.plots import COLOURS, MARKERS, STYLE
from griffin_offload.evaluation.scoring.prompt_cache import forked_cache, prompt_cache
from griffin_offload.model.hooks import Tap
from griffin_offload.pruning.fidelity import LOW, Fidelity, compare
from griffin_offload.pruning.selection import kept_neurons, select_neurons
from griffin_offload.pruning.statistic import neuron_statistic

ANSWER, LEAST = 64, 16  # tokens of an answer; a shorter one is left out
AGAIN = 64  # tokens of the prompt that are read again, at most half of them
SPARSITIES = (0.25, 0.5, 0.75)
CHOICES = ("seen", "unseen")
NAMES = ("agreement", "kl", "acceptance")
QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Why is the sky blue? Explain it to a child of ten years, in a few sentences.",
    "Give me five ideas for a cheap dinner with rice, and tell me for each of them what I have to buy for it.",
    "What is the difference between a process and a thread? Give an example of when to use which of the two.",
)
Masks = Sequence[Tensor]  # by layer: (R, 1, F), bool, the neurons that each row drops


def main() -> None:
    args = arguments()
    if args.show:
        rows = [json.loads(line) for file in args.show for line in file.read_text().splitlines()]
        show(rows)
        if args.plot:
            plot(rows, args.plot)
        return
    done = set()
    if args.out.exists():
        done = {(row["model"], row["prompt"]) for row in map(json.loads, args.out.read_text().splitlines())}
    engine = Engine(args.model)
    model = Path(engine.name).stem
    with args.out.open("a") as file:
        every = list(prompts(engine, args))
        random.Random(0).shuffle(every)  # of a run that is stopped, all kinds are there
        for name, ids in every:
            if (model, name) in done:
                continue
            answer = engine.generate(ids, sparsity=0, resident_dtype="bfloat16", greedy=True, max_new_tokens=ANSWER)
            if len(answer.token_ids) < LEAST:
                continue
            for row in figures(engine, ids, answer.token_ids):
                print(model, name, row, flush=True)
                file.write(json.dumps({"model": model, "prompt": name, "prompt_tokens": len(ids), **row}) + "\n")
            file.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="what `griffin generate --model` takes")
    parser.add_argument("--text", type=Path, help="prose, of which windows are continued")
    parser.add_argument("--xsum", type=Path, help='JSONL of {"article"}: to be summarized')
    parser.add_argument("--code", type=Path, help="a program, to be continued and explained")
    parser.add_argument("--skip", type=int, default=0, help="begin so many windows later, for other prompts")
    parser.add_argument("--out", type=Path, help="JSON lines; new ones are added")
    parser.add_argument("--show", type=Path, nargs="+", help="JSON lines to summarize")
    parser.add_argument("--plot", type=Path, help="with --show: a figure of what the report says against the truth")
    return parser.parse_args()


def prompts(engine: Engine, args: argparse.Namespace) -> Iterator[tuple[str, list[int]]]:
    """Names and token ids: prose and code to be continued, articles, questions and code in the chat template."""
    prose = engine.encode(args.text.read_text()[: 2**17], raw=True)
    code = engine.encode(args.code.read_text(), raw=True)
    for number, tokens in enumerate((32, 64, 128, 256, 512)):
        begin = 1500 * (number + args.skip)
        yield f"prose {begin} {tokens}", prose[begin : begin + tokens]
    for number, tokens in enumerate((32, 128, 512)):
        begin = 150 * number + 77 * args.skip
        yield f"code {begin} {tokens}", code[begin : begin + tokens]
    articles = [json.loads(line)["article"] for line in args.xsum.read_text().splitlines()]
    for number, tokens in enumerate((60, 120, 240, 420)):
        article = engine.tokenizer.decode(engine.encode(articles[number + 4 * args.skip], raw=True)[:tokens])
        yield f"article {number + 4 * args.skip} {tokens}", engine.encode("Summarize this text.\n\n" + article)
    for number, tokens in enumerate((40, 200)):
        part = engine.tokenizer.decode(code[600 * (number + args.skip) :][:tokens])
        yield f"explain {number + args.skip} {tokens}", engine.encode("What does this Python code do?\n\n" + part)
    if not args.skip:
        for number, question in enumerate(QUESTIONS):
            yield f"question {number}", engine.encode(question)


@torch.no_grad()
def figures(engine: Engine, prompt: list[int], answer: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each sparsity. The whole model is resident."""
    again = min(AGAIN, len(prompt) // 2)
    begin = len(prompt) - again
    sums, truth, cache = read(engine, prompt + answer, begin, len(prompt))
    masks = {choice: [dropped(engine, sums, choice, sparsity) for sparsity in SPARSITIES] for choice in CHOICES}
    stacked = [torch.cat(rows) for rows in zip(*(m for choice in CHOICES for m in masks[choice]), strict=True)]
    on_prompt = masked(engine, cache, begin, prompt[begin:], stacked)
    seen = [torch.cat(rows) for rows in zip(*masks["seen"], strict=True)]
    on_answer = masked(engine, cache, len(prompt), answer[:-1], seen)
    rows = iter(on_prompt)
    by_choice = {choice: [compare(truth[:again], next(rows)) for _ in SPARSITIES] for choice in CHOICES}
    for number, sparsity in enumerate(SPARSITIES):
        found: dict[str, Any] = {"sparsity": sparsity, "again": again}
        for choice in CHOICES:
            each = by_choice[choice][number]
            found[choice] = means(each)
            if choice == "seen":
                found |= {f"seen_{count}": means(each[-count:]) for count in (16, 32) if count <= again}
        found["answer"] = means(compare(truth[again:], on_answer[number]))
        found["answer_tokens"] = len(answer) - 1
        yield found


def means(values: Tensor) -> dict[str, float]:
    return {name: round(value, 5) for name, value in zip(NAMES, values.mean(0).tolist(), strict=True)}


def read(engine: Engine, ids: list[int], begin: int, end: int) -> tuple[list[list[Tensor]], Tensor, Any]:
    """The full model's forward over a prompt and its answer: by layer the statistic of the tokens before `begin` and of
    those up to `end`, where the prompt ends, each (F,); the logits (N, V) of the tokens from `begin` on; the cache."""
    sums: list[list[Tensor]] = []

    def watch(z: Tensor, tokens: Any, expert: Any) -> None:
        z = z.reshape(-1, z.shape[-1])
        sums.append([neuron_statistic(z[:begin]), neuron_statistic(z[:end])])

    with ExitStack() as stack:
        tap_all(engine, stack, [watch] * len(engine.skeleton.layers))
        options = {"past_key_values": prompt_cache(), "use_cache": True, "logits_to_keep": len(ids) - 1 - begin}
        output = engine.skeleton.model(torch.tensor([ids[:-1]]), **options)
    return sums, output.logits[0].clone(), output.past_key_values


def tap_all(engine: Engine, stack: ExitStack, watches: Sequence[Any]) -> None:
    for module, layer, watch in zip(engine.skeleton.modules, engine.skeleton.layers, watches, strict=True):
        (block,) = layer.blocks
        stack.callback(Tap(module, block.path, watch).remove)


def dropped(engine: Engine, sums: Sequence[Sequence[Tensor]], choice: str, sparsity: float) -> Masks:
    masks = []
    for before, everything in sums:
        kept = kept_neurons(len(everything), sparsity)
        seen, unseen = torch.ones(2, 1, 1, len(everything), dtype=torch.bool)
        seen[..., select_neurons(everything, kept)] = False
        unseen[..., select_neurons(before, kept)] = False
        masks.append({"seen": seen, "unseen": unseen}[choice])
    return masks


def masked(engine: Engine, cache: Any, before: int, ids: list[int], masks: Masks) -> Tensor:
    """Logits (R, T, V) of tokens that each row reads without its dropped neurons, behind the full model's cache of the
    `before` tokens before them."""
    parts = ((layer.keys[:, :, :before], layer.values[:, :, :before]) for layer in cache.layers)
    cut: Any = SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values) for keys, values in parts])
    found = []
    for row in range(len(masks[0])):
        forked = forked_cache(cut, before, len(engine.skeleton.layers))
        with ExitStack() as stack:
            watches = [partial(lambda mask, z, tokens, expert: z.masked_fill(mask, 0), mask[row]) for mask in masks]
            tap_all(engine, stack, watches)
            ids_again = torch.tensor([ids])
            found.append(engine.skeleton.model(ids_again, past_key_values=forked, use_cache=True).logits[0].clone())
    return torch.stack(found)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rank correlations of the prompt's figures with the acceptance on the answer, and the fitted lines."""
    models = sorted({row["model"] for row in rows})
    print(f"{len(rows)} rows: {len({row['prompt'] for row in rows})} prompts, {len(models)} models")
    for choice in ("seen", "seen_32", "seen_16", "unseen"):
        here = [row for row in rows if choice in row]
        for name in NAMES:
            values = [row[choice][name] * (-1 if name == "kl" else 1) for row in here]
            of_here = [row["answer"]["acceptance"] for row in here]
            slope, offset, error = line(values, of_here)
            print(
                f"{choice:8} {name:10} n {len(here):4}  Spearman {spearman(values, of_here):.3f}  "
                f"answer = {offset:+.3f} {slope:+.3f} x  error {error:.3f}"
            )
    kept = [Fidelity(1, **row["seen"], prompt_tokens=row["prompt_tokens"]).kept for row in rows]
    truth = [row["answer"]["acceptance"] for row in rows]
    warned = [low for value, low in zip(kept, truth, strict=True) if value < LOW]
    error = math.sqrt(sum((a - b) ** 2 for a, b in zip(kept, truth, strict=True)) / len(rows))
    print(f"what the report says: n {len(rows)}, Spearman {spearman(kept, truth):.3f}, error {error:.3f}")
    bad = [sum(value < 0.6 for value in values) for values in (warned, truth)]
    print(f"warned of: {len(warned)}, of which below 0.6: {bad[0]}, of {bad[1]} in all")
    for model in models:
        of = [number for number, row in enumerate(rows) if row["model"] == model]
        rank = spearman([kept[n] for n in of], [truth[n] for n in of])
        print(f"{model}: n {len(of)}, Spearman {rank:.3f}")
    for sparsity in SPARSITIES:
        of = [number for number, row in enumerate(rows) if row["sparsity"] == sparsity]
        rank = spearman([kept[n] for n in of], [truth[n] for n in of])
        on_prompt = sum(rows[n]["seen"]["acceptance"] for n in of) / len(of)
        means = f"acceptance on the prompt {on_prompt:.3f}, on the answer {sum(truth[n] for n in of) / len(of):.3f}"
        print(f"sparsity {sparsity}: n {len(of)}, Spearman {rank:.3f}, {means}")


def plot(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """What the report says against the acceptance on the answer: a panel for each model, a mark for each sparsity,
    larger for a longer prompt."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    models = sorted({row["model"] for row in rows})
    with rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.6 * len(models), 4.2), layout="constrained")
        axes = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
        for axis, model in zip(axes, models, strict=True):
            for number, sparsity in enumerate(SPARSITIES):
                of = [row for row in rows if row["model"] == model and row["sparsity"] == sparsity]
                said = [Fidelity(1, **row["seen"], prompt_tokens=row["prompt_tokens"]).kept for row in of]
                sizes = [4 * math.sqrt(row["prompt_tokens"]) for row in of]
                truth = [row["answer"]["acceptance"] for row in of]
                label = f"{sparsity:.0%} dropped"
                axis.scatter(said, truth, sizes, COLOURS[number], marker=MARKERS[number], alpha=0.6, label=label)
            axis.plot([0, 1], [0, 1], color="0.7", zorder=0)
            axis.set_title(model.split("-q4")[0])
            axis.set_xlabel("what the report says")
        axes[0].set_ylabel("acceptance on the answer")
        axes[0].legend(loc="upper left")
        figure.savefig(out, dpi=90)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, offset and root mean square error of the least squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    variance = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / variance
    offset = mean_y - slope * mean_x
    error = math.sqrt(sum((offset + slope * a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x))
    return slope, offset, error


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks; equals share theirs."""
    a, b = ranks(x), ranks(y)
    mean = (len(x) + 1) / 2
    above = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    return above / math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))


def ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(ordered.index(value) + 1 + len(ordered) - ordered[::-1].index(value)) / 2 for value in values]


if __name__ == "__main__":
    main()
