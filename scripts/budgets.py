"""Holds runs to their budgets from outside: each in a control group of its own, at the smallest budget that it accepts.

python scripts/budgets.py [MODEL ...] [--only WORD] [--room MIB]

For every model and every kind of run of RUNS: the command is asked with a budget that is too small, and its refusal
says which would do (or a second one does); with that one it runs again, in a memory control group of the same size and
--room MiB more for the kernel's own tables, with empty caches. A run fails if it ends badly, if the kernel kills it, or
if the peak of its RAM, as the kernel counts it, is above the budget. Needs root and Linux's control groups, version 1
or 2; without them it says so and ends with 77. Makes the table of docs/reliability.md."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20
TEXT = (Path(__file__).parent.parent / "docs" / "memory.md").read_text("utf-8") * 3
TOO_SMALL = "64MiB"
CANNOT = 77
GRIFFIN = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()"]
# name -> arguments; P, LONG, ROWS and DATA are files, OUT is what the run may write.
RUNS = {
    "generate, short prompt": "generate --prompt-file P --max-new-tokens 24 --sparsity 0.5",
    "generate, 1,000 tokens": "generate --prompt-file LONG --raw --max-new-tokens 24",
    "generate, 2,500 tokens": "generate --prompt-file LONGER --raw --max-new-tokens 24 --rest drop",
    "generate, float32": "generate --prompt-file P --max-new-tokens 16 --dtype float32 --sparsity 0.5",
    "generate, int8": "generate --prompt-file P --max-new-tokens 24 --resident-dtype int8 --rest int8 --sparsity 0.5",
    "generate, int4": "generate --prompt-file LONG --raw --max-new-tokens 24 --resident-dtype int4 --rest int4",
    "generate, lossless": "generate --prompt-file P --max-new-tokens 24 --lossless",
    "generate, refresh": "generate --prompt-file P --max-new-tokens 24 --refresh 8 --sparsity 0.5 --rest drop",
    "generate, skipping": "generate --prompt-file P --max-new-tokens 16 --ffn-skip 0.2 --ffn-skip-mode prompt",
    "batch of 6": "generate --input ROWS --output OUT.jsonl --batch-size 6 --max-new-tokens 16 --sparsity 0.5",
    "batch of 6, own neurons": "generate --input ROWS --output OUT.jsonl --batch-size 6 --per-prompt --sparsity 0.5",
    "export, safetensors": "export-pruned --prompt-file P --out OUT",
    "export, GGUF": "export-pruned --prompt-file LONG --raw --out OUT.gguf --format gguf",
    "export, 16 samples": "export-pruned --calibration DATA --samples 16 --tokens 256 --out OUT",
    "calibrate": "calibrate --force --windows 2 --prompt-tokens 128",
    "eval perplexity": "eval perplexity --data DATA --windows 2 --prompt-tokens 256 --continue-tokens 64",
    "eval perplexity, dropped": "eval perplexity --data DATA --windows 2 --continue-tokens 90 --rest drop",
}


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A memory control group, version 1 or 2, of so many bytes. Leaves with 77 where none can be made."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    version1 = "memory" in paths
    root = Path("/sys/fs/cgroup/memory" if version1 else "/sys/fs/cgroup")
    group = root / paths["memory" if version1 else ""].lstrip("/") / f"griffin-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        print(f"no memory control group can be made here: {error}", file=sys.stderr)
        sys.exit(CANNOT)
    try:
        yield group
    finally:
        group.rmdir()


def kills(group: Path) -> int:
    """Processes of a group that the kernel has killed for their memory."""
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            return int(dict(line.split() for line in (group / name).read_text().splitlines()).get("oom_kill", 0))
    return 0


def run(arguments: list[str], group: Path) -> tuple[int, int, str]:
    """Exit code, peak of its RAM in bytes, stderr of the command in a control group."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        child = subprocess.Popen(
            [*GRIFFIN, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=enter,  # noqa: PLW1509
        )
        _, status, usage = os.wait4(child.pid, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, said.read()


def smallest_budget(arguments: list[str]) -> int:
    """Bytes that a command says it needs. Raises ValueError if it says none."""
    asked = [*GRIFFIN, *arguments, "--device-memory", TOO_SMALL]
    return advised(subprocess.run(asked, capture_output=True, text=True, check=False).stderr)


def advised(told: str) -> int:
    """The bytes that a refusal says would do. Raises ValueError if it says none."""
    if found := re.search(r"--device-memory (\d+)MiB", told.replace("\n", " ")):
        return int(found[1]) * MIB
    raise ValueError(told.strip().splitlines()[-1] if told.strip() else "it refused nothing")


def files(folder: Path) -> dict[str, str]:
    """Placeholder -> the path of a file made in `folder`."""
    contents = {
        "P": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
        "LONG": TEXT[:4000],
        "LONGER": TEXT[:10000],
        "ROWS": "".join(json.dumps({"prompt": TEXT[n * 300 : n * 340 + 200]}) + "\n" for n in range(1, 7)),
        "DATA": TEXT,
    }
    for name, content in contents.items():
        (folder / f"{name}.txt").write_text(content, "utf-8")
    return {name: str(folder / f"{name}.txt") for name in contents}


def held(model: str, arguments: str, room: int) -> tuple[bool | None, str]:
    """Whether a run kept to its budget (None: it does not run at all), and its line of the table."""
    with tempfile.TemporaryDirectory(prefix="griffin-budgets-") as folder:
        places = files(Path(folder))
        words = [places.get(word, word.replace("OUT", f"{folder}/out")) for word in arguments.split()]
        words += ["--model", model]
        try:
            budget = smallest_budget(words)
        except ValueError as error:
            return None, f"- | - | not run: {error}"
        start = time.perf_counter()
        for _ in range(3):  # some commands find what they need in steps, and refuse again
            subprocess.run(["sync"], check=False)
            Path("/proc/sys/vm/drop_caches").write_text("3")
            with control_group(budget + room) as group:
                code, peak, told = run([*words, "--device-memory", str(budget)], group)
                killed = kills(group)
            more = advised(told) if code == 1 and "--device-memory" in told else 0
            if more <= budget:
                break
            budget = more
        good = code == 0 and not killed and peak <= budget
        end = "kept" if good else f"exit {code}, {killed} killed: {' '.join(told.split())[-200:]}"
        return good, f"{budget / MIB:.0f} | {peak / MIB:.0f} | {time.perf_counter() - start:.1f} | {end}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "gemma-3-270m"], help="names or paths of models")
    parser.add_argument("--only", default="", help="the runs whose name has this word")
    parser.add_argument("--room", type=int, default=16, help="MiB of the group beside the budget (default: 16)")
    asked = parser.parse_args()
    print("| model | run | budget (MiB) | peak (MiB) | seconds | |\n|---|---|---:|---:|---:|---|", flush=True)
    outcomes = []
    for model in asked.models:
        for name, arguments in RUNS.items():
            if asked.only in name:
                good, line = held(model, arguments, asked.room * MIB)
                outcomes.append(good)
                print(f"| {Path(model).stem} | {name} | {line} |", flush=True)
    ran = [outcome for outcome in outcomes if outcome is not None]
    print(f"\n{sum(ran)} of {len(ran)} kept to their budget; {len(outcomes) - len(ran)} could not be run")
    sys.exit(not ran or not all(ran))


if __name__ == "__main__":
    main()
