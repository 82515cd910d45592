"""Every way to prune or to quantize, on four kinds of numbers: log-likelihood, KL, acceptance and resident bytes.

    python scripts/method_table.py --model smollm2-135m --text wikitext2-test.txt --xsum xsum-1shot-200.jsonl \\
        --windows 8 --out figures.jsonl                # --group precision: those in fewer bits
    python scripts/method_table.py --show figures.jsonl
    python scripts/method_table.py --plot docs/figures/methods --from figures.jsonl

The first writes a row for each (text, prompt, variant); those that are there already are not made again. A window is a
place in a text: prose and code (Python's standard library) are continued, and the shorter prompts are the ends of the
longest. A chat prompt is a question, or articles to be summarized and code to be explained in the chat template where
there is one; what follows is the full model's own greedy answer. Even windows are to fit by, odd ones to check by."""

import argparse
import fnmatch
import json
import math
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin_offload import Engine
from griffin_offload.evaluation.figures.plots import COLOURS, MARKERS, STYLE
from griffin_offload.evaluation.scoring.score import score
from griffin_offload.evaluation.scoring.scored import Scored, mean_and_error
from griffin_offload.evaluation.scoring.variant import FULL, Variant
from griffin_offload.pruning.calibration import Calibration
from griffin_offload.pruning.prior import Prior, load_prior, save_prior, weight_at
from griffin_offload.pruning.shipped_text import shipped_samples, shipped_text_hash

KINDS, LENGTHS, NEXT, LEAST = ("prose", "code", "chat"), (32, 128, 512, 1024), 64, 16
WEIGHTS, STRENGTHS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), (0.1, 1.0)

STEP, PIECE = 60_000, 12_000  # characters from one window of prose to the next, and of a window
MODULES = ("textwrap", "argparse", "shutil", "csv", "tempfile", "configparser", "calendar", "zipfile", "cgi", "ast")
QUESTIONS = (
    "Why is the sky blue? Explain it to a child, in a few sentences.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Give me five ideas for a cheap dinner with rice.",
    "How do I sort a list of dictionaries by one of their keys in Python?",
    "Tell me a short story about a fisherman who finds a clock.",
    "Write a SQL query that lists the ten customers with the most orders this year.",
    "What should I think about before I buy a used bicycle?",
    "What is the difference between a process and a thread?",
    "How did the invention of printing change Europe?",
    "Write a regular expression that matches an e-mail address, and explain its parts.",
)
Row = dict[str, Any]


def main() -> None:
    args = arguments()
    if args.show or args.plot:
        rows = [row for path in args.show or args.rows for row in read(path) if "variant" in row]
        show(rows, args) if args.show else plot(rows, args.plot)
        return
    engine = Engine(args.model, device_memory=args.device_memory)
    model = Path(engine.name).stem.split("-q4")[0]
    prior = measured_prior(engine, args.out.with_name(f"{model}-{shipped_text_hash()[:8]}.prior"))
    known = read(args.out)
    answers = {key(row): row["answer"] for row in known if "answer" in row}
    done = {(*key(row), row["variant"]) for row in known if "variant" in row}
    with args.out.open("a") as file:
        for first in range(args.first, args.windows, args.together):
            numbers = range(first, min(first + args.together, args.windows))
            for kind in args.kind or KINDS:
                for length in args.length or LENGTHS:
                    variants = GROUPS[args.group](prior, length)
                    variants = {name: variant for name, variant in variants.items() if wanted(name, args.only)}
                    measure(engine, model, kind, numbers, length, variants, answers, done, file, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="what `griffin generate --model` takes")
    parser.add_argument("--text", type=Path, help="prose, of which windows are continued")
    parser.add_argument("--xsum", type=Path, help='JSONL of {"article"}: to be summarized')
    parser.add_argument("--code", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a folder of modules")
    parser.add_argument("--first", type=int, default=0, help="number of the first window")
    parser.add_argument("--windows", type=int, default=8, help="number after the last window")
    parser.add_argument("--together", type=int, default=2, help="windows that share a reading of the weights")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--length", action="append", type=int, help="tokens of the prompt")
    parser.add_argument("--group", default="selection", choices=sorted(GROUPS))
    parser.add_argument("--only", action="append", help="variants, by name: * stands for anything")
    parser.add_argument("--device-memory", default="7GiB")
    parser.add_argument("--out", type=Path, help="JSON lines; new ones are added")
    parser.add_argument("--show", type=Path, nargs="+", help="JSON lines to summarize")
    parser.add_argument("--half", type=int, choices=(0, 1), help="summarize the even windows (0) or the odd ones (1)")
    parser.add_argument("--plot", type=Path, help="the beginning of the figures' names")
    parser.add_argument("--from", dest="rows", type=Path, nargs="+", default=[], help="JSON lines to plot")
    return parser.parse_args()


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["kind"], row["window"], row["prompt_tokens"]


# Variants, by name.


def measured_prior(engine: Engine, path: Path) -> Prior:
    """The prior of the text that ships, kept in a file."""
    if not path.exists():
        samples = shipped_samples(engine.tokenizer, engine.has_chat_template)
        save_prior(path, engine.score_samples(Calibration(samples=samples)))
    return load_prior(path)


def dropped(sparsity: float = 0.5, prior: Prior | None = None, weight: float = 0.0, **more: Any) -> Variant:
    return Variant(sparsity, rest="drop", prior=prior, prior_weight=weight or None, **{"fold": False, **more})


def selection(prior: Prior, tokens: int) -> dict[str, Variant]:
    """Half of the neurons is dropped: who is kept, and what the kept ones take over. None is quantized."""
    del tokens
    shared: dict[str, Any] = {"allocation": "sensitivity"}
    found = {"full": FULL, "dropped": dropped(), "fold": dropped(fold=True)}
    found |= {"sensitivity": dropped(**shared), "fold, sensitivity": dropped(fold=True, **shared)}
    for weight in WEIGHTS:
        found[f"prior {weight}"] = dropped(0.5, prior, weight)
        found[f"fold, prior {weight}"] = dropped(0.5, prior, weight, fold=True)
        found[f"fold, sensitivity, prior {weight}"] = dropped(0.5, prior, weight, fold=True, **shared)
    return found | {f"fold of {s}": dropped(fold=True, fold_strength=s) for s in STRENGTHS}


def shares(prior: Prior, tokens: int) -> dict[str, Variant]:
    """A quarter, half and three quarters dropped: the paper's method, and with everything that is on by default."""
    found, weight = {"full": FULL}, weight_at(tokens)
    for share in (0.25, 0.5, 0.75):
        found[f"dropped {share}"] = dropped(share)
        found[f"ours {share}"] = dropped(share, prior, weight, fold=True)
        found[f"ours, sensitivity {share}"] = dropped(share, prior, weight, fold=True, allocation="sensitivity")
    return found


def precision(prior: Prior, tokens: int) -> dict[str, Variant]:
    """In fewer bits: these are the real models, quantized."""
    del prior, tokens
    return {
        "full": FULL,
        "int8": Variant(0.0, resident_dtype="int8"),
        "int4": Variant(0.0, resident_dtype="int4"),
        "half bfloat16, half int4": Variant(0.5, rest="int4"),
        "half int8, half int4": Variant(0.5, resident_dtype="int8", rest="int4"),
        "half int4, half dropped": Variant(0.5, resident_dtype="int4", rest="drop"),
    }


GROUPS = {"selection": selection, "shares": shares, "precision": precision}

# Texts.


def pair(engine: Engine, kind: str, number: int, length: int, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """A prompt, and what follows it in the text; of chat nothing."""
    if kind == "chat":
        return chat_prompt(engine, number, length, args), []
    if kind == "prose":
        text = args.text.read_text()[number * STEP :][: 2 * PIECE]
    else:
        text = (args.code / f"{MODULES[number]}.py").read_text()[2000:][: 2 * PIECE]
    text = text[text.index("\n") + 1 :]
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = engine.tokenizer("a")["input_ids"][:-1]  # BOS, where the model begins a text with it
    if len(ids) < max(LENGTHS) + NEXT:
        raise SystemExit(f"window {number} of {kind} is too short")
    return [*first, *ids[max(LENGTHS) - length : max(LENGTHS)]], ids[max(LENGTHS) :][:NEXT]


def chat_prompt(engine: Engine, number: int, length: int, args: argparse.Namespace) -> list[int]:
    """A prompt of about `length` tokens. At the shortest length a question, of any length."""
    if length == min(LENGTHS):
        return engine.encode(QUESTIONS[number])
    if number % 2:
        asked = "What does this Python code do?\n\n"
        content = (args.code / f"{MODULES[-1 - number]}.py").read_text()[2500:][: 2 * PIECE]
    else:
        asked = "Summarize this text in a few sentences.\n\n"
        articles = [json.loads(line)["article"] for line in args.xsum.read_text().splitlines()[20 * number :][:8]]
        content = "\n\n".join(text.split("Article: ")[-1].split("\n\nSummarize")[0] for text in articles)
    room = length - len(engine.encode(asked + "a")) + 1
    return engine.encode(asked + engine.tokenizer.decode(engine.encode(content, raw=True)[:room], True))


def measure(
    engine: Engine,
    model: str,
    kind: str,
    numbers: Sequence[int],
    length: int,
    variants: Mapping[str, Variant],
    answers: dict[tuple[Any, ...], list[int]],
    done: set[tuple[Any, ...]],
    file: Any,
    args: argparse.Namespace,
) -> None:
    """Rows for some windows of a kind."""
    places = [((model, kind, number, length), *pair(engine, kind, number, length, args)) for number in numbers]
    missing = {name for name in variants for place, *_ in places if (*place, name) not in done}
    if not missing:
        return
    new = [(place, prompt) for place, prompt, _ in places if kind == "chat" and place not in answers]
    for place, prompt in new:
        made = engine.generate(prompt, sparsity=0, resident_dtype="bfloat16", greedy=True, max_new_tokens=NEXT)
        answers[place] = made.token_ids
        write(file, {**facts(place), "answer": made.token_ids})
    found = [(place, prompt, following or answers[place]) for place, prompt, following in places]
    found = [each for each in found if len(each[2]) >= LEAST]
    asked = {name: variants[name] for name in variants if name in missing}
    scored = score(engine, [(prompt, following) for _, prompt, following in found], list(asked.values()))
    for (place, prompt, following), of_pair in zip(found, scored, strict=True):
        for (name, variant), each in zip(asked.items(), of_pair, strict=True):
            if (*place, name) not in done:
                done.add((*place, name))
                held = variant.plan(engine, len(prompt), len(following)).resident_bytes
                write(file, {**facts(place), "tokens": len(prompt), "variant": name, "bytes": held, **means(each)})
    print(model, kind, list(numbers), length, flush=True)


def facts(place: tuple[Any, ...]) -> Row:
    return dict(zip(("model", "kind", "window", "prompt_tokens"), place, strict=True))


def means(scored: Scored) -> Row:
    """Without the first token, which the full model predicts."""
    names = ("log_probability", "kl", "acceptance", "agrees")
    return {name: round(getattr(scored, name)[1:].float().mean().item(), 6) for name in names}


def write(file: Any, row: Row) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


# Tables and figures.


def show(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Markdown tables: of each model, text and prompt, perplexity and acceptance, and how much of the gap in
    log-perplexity between the full model and the paper's method is closed, with its standard error over windows."""
    found = [row for row in rows if args.half is None or row["window"] % 2 == args.half]
    names = [name for name in dict.fromkeys(row["variant"] for row in found) if wanted(name, args.only)]
    lengths = sorted({row["prompt_tokens"] for row in found})
    for model in sorted({row["model"] for row in found}):
        for kind in (*KINDS, "all"):
            here = [row for row in found if row["model"] == model and kind in (row["kind"], "all")]
            if not here:
                continue
            print(f"\n| {model}, {kind} | " + " | ".join(f"{length} tokens" for length in lengths) + " |")
            print("|---" * (len(lengths) + 1) + "|")
            for name in names:
                print(f"| {name} | " + " | ".join(cell(windows(here, length), name) for length in lengths) + " |")


def wanted(name: str, patterns: Sequence[str] | None) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def windows(rows: Sequence[Row], length: int) -> list[dict[str, Row]]:
    """Rows of a prompt length by text and window, each by variant."""
    found: dict[Any, dict[str, Row]] = {}
    for row in rows:
        if row["prompt_tokens"] == length:
            found.setdefault((row["model"], row["kind"], row["window"]), {})[row["variant"]] = row
    return list(found.values())


def cell(places: Sequence[Mapping[str, Row]], name: str) -> str:
    here = [place for place in places if name in place]
    if not here:
        return "-"
    loss = -sum(place[name]["log_probability"] for place in here) / len(here)
    acceptance, error = mean_and_error([place[name]["acceptance"] for place in here])
    text = f"{math.exp(loss):.3g} ({acceptance:.3f} ± {error:.3f}; KL {mean_of(here, name, 'kl'):.3f})"
    papers = f"dropped {name.rsplit(' ', 1)[-1]}" if share_of(name) else "dropped"
    gaps = [(gap(place, name), gap(place, papers)) for place in here if papers in place and "full" in place]
    if name in ("full", papers) or not gaps:
        return text
    return text + " {:.0f} ± {:.0f} %".format(*(100 * value for value in closed(gaps)))


def share_of(name: str) -> str:
    """The sparsity at the end of a variant's name, or nothing."""
    last = name.rsplit(maxsplit=1)[-1]
    return last if last in ("0.25", "0.5", "0.75") and "prior" not in name else ""


def mean_of(places: Sequence[Mapping[str, Row]], name: str, field: str) -> float:
    return float(sum(place[name][field] for place in places) / len(places))


def gap(place: Mapping[str, Row], name: str) -> float:
    """Log-likelihood that a variant loses against the full model, nats a token."""
    return float(place["full"]["log_probability"] - place[name]["log_probability"])


def closed(gaps: Sequence[tuple[float, ...]]) -> tuple[float, float]:
    """(of the variant, of the paper's method) by window -> the share of the gap that is closed, and its standard error
    by the jackknife."""
    ours, theirs = (sum(each) for each in zip(*gaps, strict=True))
    count = len(gaps)
    if count < 2:
        return 1 - ours / theirs, 0.0
    without = [1 - (ours - a) / (theirs - b) for a, b in gaps]
    mean = sum(without) / count
    return 1 - ours / theirs, math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))


def plot(rows: Sequence[Row], begin: Path) -> None:
    """A figure for each model: perplexity and acceptance against resident bytes, by length of the prompt."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    for model in sorted({row["model"] for row in rows}):
        here = [row for row in rows if row["model"] == model]
        lengths = sorted({row["prompt_tokens"] for row in here})
        titles = list(dict.fromkeys(title(row["variant"]) for row in sorted(here, key=lambda row: row["variant"])))
        with rc_context(STYLE):
            figure = Figure(figsize=(max(7.5, 1 + 2.6 * len(lengths)), 5.6), layout="constrained")
            axes = figure.subplots(2, len(lengths), sharex=True, sharey="row", squeeze=False)
            for column, length in zip(axes.T, lengths, strict=True):
                curves(column, windows(here, length), titles)
                column[0].set_title(f"prompt of {length} tokens")
                column[1].set_xlabel("resident weights, MiB")
            axes[0][0].set_ylabel("perplexity of what follows")
            axes[0][0].set_yscale("log")
            axes[0][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0][0].yaxis.set_major_formatter("{x:.0f}")
            axes[0][0].yaxis.set_minor_formatter("")
            axes[1][0].set_ylabel("acceptance")
            drawn = {
                label: mark for row in axes[0] for mark, label in zip(*row.get_legend_handles_labels(), strict=True)
            }
            figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3)
            figure.suptitle(model)
            figure.savefig(f"{begin}-{model}.png", dpi=90)


def title(name: str) -> str:
    """Of the line that a variant is a point of."""
    line = name.removesuffix(share_of(name)).strip()
    return {"dropped": "dropped (the paper's)", "ours": "fold and prior"}.get(line, line.replace("ours", "fold, prior"))


def curves(axes: Any, places: Sequence[Mapping[str, Row]], titles: Sequence[str]) -> None:
    """Lines of what is dropped by how much, points of what is in fewer bits, over windows with the most variants."""
    most = max(map(len, places))
    places = [place for place in places if len(place) == most]
    lines: dict[str, list[str]] = {}
    for name in places[0]:
        lines.setdefault(title(name), []).append(name)
    for label, names in lines.items():
        points = []
        for name in names:
            here = [place[name] for place in places]
            loss = -sum(row["log_probability"] for row in here) / len(here)
            acceptance, error = mean_and_error([row["acceptance"] for row in here])
            points.append((sum(row["bytes"] for row in here) / len(here) / 2**20, math.exp(loss), acceptance, error))
        x, perplexities, acceptances, errors = zip(*sorted(points), strict=True)
        number = titles.index(label)
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        look["alpha"] = 1 if number < len(COLOURS) else 0.5
        axes[0].plot(x, perplexities, label=label, **look)
        axes[1].errorbar(x, acceptances, errors, capsize=2, **look)


if __name__ == "__main__":
    main()
