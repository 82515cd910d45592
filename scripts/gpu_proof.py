"""The tests marked gpu, then Griffin beside accelerate and plain transformers on a GPU, as one table in Markdown.

Run it by gpu-proof.sh. The model is a checkpoint of random weights, written once (26 GB for llama-2-13b) and used
again. Every run is a process of its own; what the time does not allow is left out, and said so. The last lines are the
table and what failed; all measurements go to a JSON file. Exit code 1 if anything failed."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin_offload.errors import GriffinError
from griffin_offload.evaluation.bench.bench import Asked, Bench, bench, parse_lengths
from griffin_offload.evaluation.bench.runner import try_conditions
from griffin_offload.evaluation.bench.synthetic import synthesise, synthetic_folder
from griffin_offload.memory.machine import available_memory, best_device, check_device
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import format_bytes, format_rate, parse_bytes

ROOT = Path(__file__).resolve().parent.parent
TESTS_S = 200  # at most, of the tests
LEFT_OUT = (  # the table below measures both
    "tests/cli/test_gpu.py::test_bench",
    "tests/model/test_static_step_on_gpu.py::test_layers_are_compiled_once_and_kept_on_disk",
)
COLD_S = 75  # kept for the run with cold caches
ANSWER_S = 15.0  # a run stops so long after its first token
COLUMNS = (
    *("", "prompt pass, cold (s)", "of limit", "from page cache (s)", "of limit", "again, from RAM (s)", "of limit"),
    *("tokens/s", "of limit", "peak", "peak of RAM", "note"),
)
Row = Mapping[str, Any]


def main() -> int:
    start, args = time.monotonic(), arguments()
    device = check_device(args.device) if args.device else best_device()

    def left() -> float:
        return max(1.0, start + 60 * float(args.minutes) - time.monotonic())

    tests = run_tests(min(TESTS_S, left())) if args.tests else {"summary": "left out, as asked", "returncode": 0}
    folder = checkpoint(args.model, args.folder)
    asked: dict[str, Any] = {
        **{"name": args.model, "folder": folder, "budget": parse_bytes(args.device_memory)},
        **{"lengths": parse_lengths(args.lengths), "sparsities": (0.5,), "repeats": 1, "max_seconds": ANSWER_S},
        **{"device": device, "capped": device != "cpu"},
        # Said aloud, since by default nothing is kept in RAM that the page cache has.
        "ram": parse_bytes(args.host_memory) if args.host_memory else available_memory() // 2,
    }
    formats: dict[str, Any] = {
        "resident_dtypes": ("bfloat16", "int8", "int4"),
        "rests": ("drop", "int4"),
        "auto": True,
        "compiles": True,
    }
    methods = ("griffin", "accelerate", "full")
    say("caches warm")
    warm = bench(Asked(methods=methods, cold=False, stop_after=max(1.0, left() - COLD_S), **formats, **asked), say)
    say("caches cold")
    last = Asked(methods=("griffin",), stop_after=left(), **asked)
    if not_cold := try_conditions(last).not_cold:
        say(f"nothing is read from the disk: caches are warm, {not_cold}")
    cold = None if not_cold else bench(last, say)
    return finish(tests, warm, cold, args.out, time.monotonic() - start)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-2-13b", help="alias whose shape is measured (griffin models)")
    parser.add_argument("--folder", type=Path, help="where its random weights are, or go (default: griffin's cache)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--device-memory", default="20GiB")
    parser.add_argument("--host-memory", help="RAM that may keep weights (default: half of what is free)")
    parser.add_argument("--lengths", default="512+128", help="tokens of the prompt + tokens of the answer")
    parser.add_argument("--minutes", type=float, default=8.0, help="no run goes on after them")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-proof.json")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out pytest -m gpu")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def run_tests(seconds: float) -> dict[str, Any]:
    """pytest -m gpu, without what runs below anyway."""
    say("pytest -m gpu")
    proof = ROOT / "build" / "proof"  # gpu-proof.sh makes it where the package is not installed
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), "-m", "gpu", *(part for test in LEFT_OUT for part in ("--deselect", test))]
    try:
        place = proof if str(proof) in sys.path else ROOT
        done = subprocess.run(
            command,
            cwd=place,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        print(error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or "")
        return {"summary": f"stopped: not done after {seconds:.0f} s", "returncode": 1}
    lines = done.stdout.strip().splitlines() or ["it said nothing"]
    if done.returncode:
        print(done.stdout)
    say(f"pytest: {lines[-1]}")
    return {"summary": lines[-1], "returncode": done.returncode}


def checkpoint(alias: str, folder: Path | None) -> Path:
    """The folder of random weights in the shape of a model, written if it is not there."""
    model, start = CATALOGUE[alias.lower()], time.monotonic()
    found = synthesise(model, (folder or synthetic_folder(model.alias)).absolute())
    say(f"{found} is ready after {time.monotonic() - start:.1f} s")
    return found


def finish(tests: Row, warm: Bench, cold: Bench | None, out: Path, seconds: float) -> int:
    """Prints the table and what failed, and writes the JSON file. Returns the exit code."""
    rows, cold_rows = labelled(warm), labelled(cold) if cold else []
    machine, cold_machine = warm.machine(), cold.machine() if cold else {}
    facts = {"tests": tests, "warm": [machine, *rows], "cold": [cold_machine, *cold_rows], "seconds": seconds}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1))
    wrong = failures(tests, [*rows, *cold_rows])
    print("\n".join(["", *header(machine, cold_machine, tests, seconds), "", *table(rows, cold_rows)]))
    print(f"\nAll measurements: {out}")
    for text in wrong:
        print(f"FAILED: {text}")
    return 1 if wrong else 0


def labelled(done: Bench) -> list[dict[str, Any]]:
    return [{"label": row.label, **done.summary(row)} for row in done.rows]


def failures(tests: Row, rows: Sequence[Row]) -> list[str]:
    """What went wrong. A row that was not run, with its reason, did not."""
    found = [f"pytest -m gpu: {tests['summary']}"] if tests["returncode"] else []
    return found + [f"{row['label']}: {row['error']}" for row in rows if row["error"] and "not run" not in row["error"]]


def header(warm: Row, cold: Row, tests: Row, seconds: float) -> list[str]:
    """The machine, its limits and the tests, as lines of Markdown."""
    device, reading = warm["device_facts"], warm["reading"]
    name = device.get("name") or warm["processor"]
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    limits = {"disk": cold.get("reading", {}), "page cache": reading}
    speeds = {what: found.get("bandwidth") for what, found in limits.items()}
    speeds |= {"bus": device.get("bus_bandwidth"), "device memory": device.get("memory_bandwidth")}
    told = [f"{what} {format_rate(speed)}" for what, speed in speeds.items() if speed]
    told += [f"{n} tokens of prompt {a['seconds']:.3f} s" for n, a in warm["arithmetic"].items() if "seconds" in a]
    versions = f"torch {warm['torch']}, transformers {warm['transformers']}, Python {warm['python']}"
    return [
        f"{name}{driver}; {warm['cores']} cores, {format_bytes(warm['ram_bytes'])} of RAM; {versions}.",
        f"{warm['model']}, {format_bytes(warm['file_bytes'])}, in {format_bytes(warm['budget_bytes'])}: "
        f"{warm['conditions']}.",
        f"Limits: {', '.join(told)}.",
        f"pytest -m gpu: {tests['summary']}. All of it took {seconds:.0f} s.",
    ]


def table(rows: Sequence[Row], cold_rows: Sequence[Row]) -> list[str]:
    """A line of Markdown for each row; `cold_rows`: the same with cold caches, as far as they were run."""
    cold = {row["label"]: row for row in cold_rows if row["prompt_s"]}
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(row, cold.get(row["label"], {})) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def cells(row: Row, cold: Row) -> tuple[str, ...]:
    """A row's cells. The prompt pass of a method that loads its weights first has no limit to be compared with."""
    loads = row["method"] in ("full", "accelerate") and row["runs"]
    load = [f"loads for {row['load_s']:.1f} s before"] if loads else []
    passes = [
        number(cold.get("prompt_s")),
        share(cold.get("x_floor"), loads),
        number(row["prompt_s"]),
        share(row["x_floor"], loads),
        number(row["prompt_again_s"]),
        share(row["x_floor_again"], loads),
    ]
    speed = [f"{row['tokens_per_s']:.3g}" if row["tokens_per_s"] else "-"]
    speed += [f"{row['of_limit']:.0%}" if row["of_limit"] else "-"]
    sizes = [format_bytes(row[name]) if row[name] else "-" for name in ("peak_bytes", "ram_peak_bytes")]
    note = ". ".join([*load, *(text for text in (row["note"], row["error"]) if text)])
    return (row["label"], *passes, *speed, *sizes, note.replace("|", "/"))


def number(seconds: float | None) -> str:
    return f"{seconds:.2f}" if seconds else "-"


def share(times_floor: float | None, loads: object = False) -> str:
    """How close to the limit a time is: 0.5 for twice the floor."""
    return f"{1 / times_floor:.0%}" if times_floor and not loads else "-"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GriffinError as error:
        sys.exit(f"error: {error}")
