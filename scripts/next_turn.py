"""What the second turn of a conversation costs, beside a pass over the whole conversation: bytes read, and seconds to
the first token. Makes the table of docs/benchmarks.md.

python scripts/next_turn.py FOLDER [--synthetic ALIAS] [--share 0.8] [--first 1000] [--new 100] [--answer 24]
[--rounds 2] [--pruning sparsity=0.5,rest=drop ...]

`--synthetic`: random weights in that model's shape are written to FOLDER, if it is not there. Every process is held by
a control group to `--share` of the checkpoint's size, page cache included, and begins with empty caches; it needs root.
In one process: the first turn, the second, another answer to it, and the sweep that the second would have been. In
another one: the sweep of the whole conversation by a process that has nothing in memory. The best of the rounds counts.
The rest's bytes are those of the neurons that are not in memory as they are on disk."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "options",
    "in the rest",
    "what",
    "computed",
    "read",
    "x the rest's",
    "first token (s)",
    "x the sweep",
    "peak",
)
TEXT = Path(__file__).parent.parent / "docs" / "memory.md"
GIB = 2**30


def measured(answer: Any) -> dict[str, Any]:
    report = answer.report
    return {
        "computed": report.plan.pass_tokens,
        "prompt": report.plan.prompt_tokens,
        "read": report.bytes_read,
        "first": report.time_to_first_token_s,
        "peak": report.measured_peak,
        "planned": report.plan.peak,
    }


def rest_bytes(sizes: Any, plan: Any) -> int:
    """Bytes on disk of the neurons that are not resident as they are."""
    if plan.precision.kept:
        return sum(layer.feed_forward(layer.whole) for layer in sizes.layers)
    layers = zip(sizes.layers, plan.kept, strict=True)
    return sum(layer.feed_forward(layer.whole) - layer.feed_forward(kept) for layer, kept in layers)


def converse(asked: argparse.Namespace, pruning: dict[str, Any], whole: bool) -> dict[str, Any]:
    """`whole`: the sweep of a conversation of which nothing is in memory."""
    from griffin_offload import Engine

    engine = Engine(asked.folder)
    ids = engine.encode(TEXT.read_text("utf-8") * 4, raw=True)
    first, new = ids[: asked.first], ids[asked.first : asked.first + asked.new]
    options = {**pruning, "greedy": True, "no_fidelity": True, "max_new_tokens": asked.answer}
    length = len(first) + asked.answer + len(new)
    if whole:
        return {"cold": measured(engine.generate(ids[:length], **options))}
    found = engine.generate(first, **options, min_new_tokens=asked.answer, continues=True)
    second = [*first, *found.token_ids, *new]
    made = {"first turn": measured(found)}
    for name in ("second turn", "another answer"):
        answer = engine.generate(second, **options, continues=True)
        made[name] = measured(answer)
    made["rest"] = rest_bytes(engine.sizes, answer.report.plan)  # type: ignore[assignment]
    made["sweep"] = measured(engine.generate(second, **options))
    return made


def run(asked: argparse.Namespace, limit: int, pruning: str, whole: bool) -> dict[str, Any]:
    from griffin_offload.evaluation.bench.control_group import control_group
    from griffin_offload.evaluation.bench.page_cache import drop_caches

    own = [sys.executable, __file__, *sys.argv[1:], "--one", f"{pruning}:{int(whole)}"]
    drop_caches()
    with control_group(limit) as group:
        done = subprocess.run(group.enter(own), check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return {**found, "group": group.peak()}


def value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def best(rounds: list[dict[str, Any]], what: str) -> dict[str, Any]:
    return min((each[what] for each in rounds), key=lambda each: each["first"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--synthetic")
    parser.add_argument("--share", type=float, default=0.8)
    for name, default in (("first", 1000), ("new", 100), ("answer", 24), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pruning", nargs="*", default=["sparsity=0.6,rest=drop", ""])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        pruning, _, whole = asked.one.rpartition(":")
        options = {name: value(text) for name, text in (pair.split("=") for pair in pruning.split(",") if pair)}
        print(json.dumps(converse(asked, options, whole == "1")))
        return
    if asked.synthetic:
        from griffin_offload.evaluation.bench.synthetic import synthesise
        from griffin_offload.sources.resolve import CATALOGUE

        synthesise(CATALOGUE[asked.synthetic], Path(asked.folder))
    size = sum(file.stat().st_size for file in Path(asked.folder).glob("*.safetensors"))
    limit = int(asked.share * size)
    print(f"{size / GIB:.2f} GiB, held to {limit / GIB:.2f} GiB, {os.cpu_count()} cores\n")
    print("|", " | ".join(COLUMNS), "|\n|", " --- |" * len(COLUMNS))
    for pruning in asked.pruning:
        rounds = [
            {**run(asked, limit, pruning, whole=True), **run(asked, limit, pruning, whole=False)}
            for _ in range(asked.rounds)
        ]
        rest, sweep = rounds[0]["rest"], best(rounds, "cold")["first"]
        for what in ("cold", "sweep", "first turn", "second turn", "another answer"):
            row = best(rounds, what)
            times = f"{row['read'] / rest:.2f}" if rest else ""
            cells = [pruning.replace(",", " "), f"{rest / GIB:.2f} GiB", what, f"{row['computed']} of {row['prompt']}"]
            cells += [f"{row['read'] / GIB:.2f} GiB", times, f"{row['first']:.2f}", f"{row['first'] / sweep:.2f}"]
            cells += [f"{row['peak'] / GIB:.2f} of {row['planned'] / GIB:.2f} GiB"]
            print("|", " | ".join(cells), "|", flush=True)
        print(f"\npeak of the group: {max(each['group'] for each in rounds) / GIB:.2f} GiB\n")


if __name__ == "__main__":
    main()
