"""Fuzzes what Griffin reads: `make fuzz CASES=1000000 JOBS=2`. A case is a target and a seed, and comes out the same
each time: `python tests/fuzz/run.py --case "gguf header" 17` runs one again, with its traceback.

A finding is any end of a read but a result or one of our errors, more than SECONDS, or more than MEMORY. Its input is
written to OUT; a copy in tests/fuzz/findings/ is read by the tests from then on."""

import argparse
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz.mutate import damaged
from fuzz.targets import TARGETS, Inputs, Target

from griffin_offload.errors import GriffinError

SECONDS = 5.0  # of a case, of the process's own time
MEMORY = 256 * 2**20  # by which a case may raise the process's peak
CHUNK = 50  # cases that a process takes at a time
FINDINGS = Path(__file__).parent / "findings"


class TooLong(KeyboardInterrupt):  # which nobody takes for an error
    """A case takes more than its time."""


def run_case(inputs: Inputs, target: Target, data: bytes, seconds: float = SECONDS) -> str:
    """What is wrong with the end of reading an input; '' for nothing."""
    path = inputs.root / target.file
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        target.read(inputs, path)
    except GriffinError as error:
        wrong = f"an error of several lines: {str(error)[:100]!r}" if "\n" in str(error) else ""
    except TooLong:
        wrong = f"more than {seconds:g} s"
    except BaseException as error:  # Rust's panics are no Exception
        if type(error) is KeyboardInterrupt:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {' '.join(str(error).split())}"
    else:
        wrong = ""
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return wrong.replace(str(inputs.root), "") or (f"more by {grown / 2**20:.0f} MiB" if grown > MEMORY else "")


def case_of(seeds: dict[str, bytes], target: Target, seed: int) -> bytes:
    return damaged(seeds[target.name], target.form, Random(f"{target.name} {seed}"), target.words)


def ready(inputs: Inputs) -> dict[str, bytes]:
    """Reads every target's own input once, whole; returns them."""

    def stop(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGVTALRM, stop)
    warnings.simplefilter("ignore")
    _hush()
    seeds = {target.name: inputs.seed(target) for target in TARGETS.values()}
    for target in TARGETS.values():
        target.read(inputs, inputs.root / target.file)
    return seeds


def restore(inputs: Inputs, target: Target, seeds: dict[str, bytes]) -> None:
    (inputs.root / target.file).write_bytes(seeds[target.name])


def _hush() -> None:
    import logging

    logging.disable(logging.CRITICAL)
    from transformers.utils import logging as theirs

    theirs.set_verbosity(100)


def work(number: int, made: Path, cases: Any, current: Any, results: Any) -> None:
    """A process: takes chunks of cases until there are none. `current`, of three numbers a process: (target, seed,
    since), for the parent."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    root = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=made.parent))
    inputs = Inputs(made).copy(root / "inputs")
    names = list(TARGETS)
    with inputs.environment():
        seeds = ready(inputs)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust's panics print
        while (chunk := cases.get()) is not None:
            name, first, count = chunk
            target, found, start = TARGETS[name], [], time.perf_counter()
            for seed in range(first, first + count):
                current[3 * number : 3 * number + 3] = [names.index(name), seed, time.time()]
                try:
                    wrong = run_case(inputs, target, case_of(seeds, target, seed))
                except Exception as error:
                    wrong = f"of the fuzzer itself: {error!r}"
                if wrong:
                    found.append((seed, wrong))
            restore(inputs, target, seeds)
            results.put((name, count, time.perf_counter() - start, found))
    current[3 * number + 2] = 0.0
    shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", action="append", choices=[*TARGETS], help="fuzz these targets alone")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--case", nargs=2, metavar=("TARGET", "SEED"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder below goes too
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    work_folder = Path(tempfile.mkdtemp(prefix="griffin-fuzz-", dir=place))
    try:
        made = Inputs(work_folder / "made").make()
        if asked.case:
            return run_again(made, TARGETS[asked.case[0]], int(asked.case[1]))
        return run_all(made, asked)
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)


def run_again(inputs: Inputs, target: Target, seed: int) -> int:
    with inputs.environment():
        data = case_of(ready(inputs), target, seed)
        print(f"{len(data)} bytes: {data[:3000]!r}")
        path = inputs.root / target.file
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            target.read(inputs, path)
        finally:
            print(f"{time.perf_counter() - start:.3f} s")
    return 0


def run_all(made: Inputs, asked: Any) -> int:
    weights = {name: target.weight for name, target in TARGETS.items() if not asked.only or name in asked.only}
    counts = {name: -(-asked.cases * weight // sum(weights.values())) for name, weight in weights.items()}
    with made.environment():
        seeds = ready(made)  # fails here rather than in every process
    context = multiprocessing.get_context("spawn")
    cases, results = context.Queue(), context.Queue()
    current = context.Array("d", 3 * asked.jobs)
    chunks = [(n, asked.first + at, min(CHUNK, c - at)) for n, c in counts.items() for at in range(0, c, CHUNK)]
    Random(0).shuffle(chunks)
    for chunk in chunks:
        cases.put(chunk)
    for _ in range(2 * asked.jobs):
        cases.put(None)
    workers = [_start(context, number, made, cases, current, results) for number in range(asked.jobs)]
    done, seconds, found, kinds = Counter[str](), Counter[str](), 0, Counter[str]()
    start = told = time.perf_counter()
    while any(worker.exitcode != 0 for worker in workers) or not results.empty():
        while not results.empty():
            name, count, took, findings = results.get()
            done[name] += count
            seconds[name] += took
            for seed, wrong in findings:
                found += 1
                _keep(asked.out, seeds, TARGETS[name], seed, wrong, kinds)
        for number, worker in enumerate(workers):
            name, seed, since = current[3 * number : 3 * number + 3]
            hangs = worker.is_alive() and since and time.time() - since > 10 * SECONDS
            if hangs:
                worker.kill()
                worker.join()
            if hangs or (not worker.is_alive() and worker.exitcode):
                found += 1
                why = "hangs" if hangs else f"the process ends with {worker.exitcode}"
                _keep(asked.out, seeds, [*TARGETS.values()][int(name)], int(seed), why, kinds)
                workers[number] = _start(context, number, made, cases, current, results)
        total = sum(done.values())
        if time.perf_counter() - told > 5:
            told = time.perf_counter()
            rate = total / (told - start)
            print(f"{total:,} of {sum(counts.values()):,} cases, {rate:,.0f} a second, {found} findings", flush=True)
        time.sleep(0.2)
    took = time.perf_counter() - start
    print(f"\n{'target':<20}{'cases':>12}{'cases/s of a core':>20}")
    for name in counts:
        print(f"{name:<20}{done[name]:>12,}{done[name] / max(1e-9, seconds[name]):>20,.0f}")
    print(f"{'all':<20}{sum(done.values()):>12,}{sum(done.values()) / took:>20,.0f} (of all processes)")
    for kind, count in kinds.most_common():
        print(f"{count:>8} x {kind}")
    print(f"{found} findings" + (f" in {asked.out}" if found else ""))
    return 1 if found else 0


def _start(context: Any, number: int, made: Inputs, cases: Any, current: Any, results: Any) -> Any:
    current[3 * number : 3 * number + 3] = [0, 0, 0]
    worker = context.Process(target=work, args=(number, made.root, cases, current, results), daemon=True)
    worker.start()
    return worker


def _keep(out: Path, seeds: dict[str, bytes], target: Target, seed: int, wrong: str, kinds: Counter[str]) -> None:
    """Writes a finding's input to OUT, as the tests read it from FINDINGS, and how to run it again to findings.txt."""
    kind = f"{target.name}: {wrong[:160]}"
    if not kinds[kind]:
        (out / f"{target.name.replace(' ', '_')}-{seed}").write_bytes(case_of(seeds, target, seed))
    kinds[kind] += 1
    with (out / "findings.txt").open("a") as file:
        file.write(f'--case "{target.name}" {seed}: {wrong}\n')


if __name__ == "__main__":
    sys.exit(main())
