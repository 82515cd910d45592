"""Throughput of `griffin generate --input` by numbers of workers, in turn on the same prompts.

python scripts/workers_table.py [--model NAME] [--rounds N] [--prompts N]

Each round runs every division of the CPU once; what is told is each one's median of prompts a second, its ratio to one
worker with all threads, the bytes that came from disk (x the checkpoint: of the first round, whose page cache is empty
where the system lets us empty it), and what bounded it. Makes the table of docs/benchmarks.md."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

GRIFFIN = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()"]
TEXT = (Path(__file__).parent.parent / "docs" / "memory.md").read_text("utf-8")


def empty_page_cache() -> None:
    """Where this process may."""
    subprocess.run(["sync"], check=False)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def run(arguments: list[str], folder: Path, workers: int, threads: int) -> dict[str, Any]:
    """The `run` that --json tells, and the texts of the answers."""
    output = folder / "answers.jsonl"
    given = ["--input", str(folder / "prompts.jsonl"), "--output", str(output), "--force", "--json"]
    command = [*GRIFFIN, "generate", *arguments, *given, "--workers", str(workers), "--threads", str(threads)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    texts = [json.loads(line)["text"] for line in output.read_text("utf-8").splitlines()]
    return {**told["run"], "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("options", nargs="*", help="further options of griffin generate, after --")
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    divisions = [(workers, max(1, cores // workers)) for workers in (1, 2, 4)]
    arguments = ["--model", asked.model, "--device", "cpu", "--sparsity", "0.5", "--max-new-tokens", "32", "--greedy"]
    found: dict[tuple[int, int], list[dict[str, Any]]] = {each: [] for each in divisions}
    with tempfile.TemporaryDirectory(prefix="griffin-workers-") as name:
        folder = Path(name)
        rows = [{"prompt": TEXT[500 * n : 500 * n + 800]} for n in range(asked.prompts)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        for number in range(asked.rounds):
            for workers, threads in divisions:
                if not number:
                    empty_page_cache()
                found[workers, threads].append(run([*arguments, *asked.options], folder, workers, threads))
    one = found[divisions[0]]
    print(f"{asked.model}, {asked.prompts} prompts, {asked.rounds} rounds, {cores} cores\n")
    print("| workers | threads each | prompts/s | x one worker | MiB from disk at first | bound by | same answers |")
    print("|---:|---:|---:|---:|---:|---|---|")
    for (workers, threads), runs in found.items():
        rate = statistics.median(each["prompts_per_s"] for each in runs)
        pairs = zip(runs, one, strict=True)
        ratio = statistics.median(each["prompts_per_s"] / other["prompts_per_s"] for each, other in pairs)
        disk, same = runs[0]["bytes_from_disk"] / 2**20, all(each["texts"] == one[0]["texts"] for each in runs)
        print(
            f"| {workers} | {threads} | {rate:.2f} | {ratio:.2f} | {disk:.0f} | {runs[-1]['bound_by']} | "
            f"{'yes' if same else 'no'} |"
        )


if __name__ == "__main__":
    main()
