"""Methods side by side on one machine: each run in a fresh process, with the same memory and the same prompt.

Their limits are measured too: reading the checkpoint, the arithmetic of the prompt, the memory's bandwidth."""

import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from ...workspace import workspace
from .asked import Asked, Lengths, parse_lengths, parse_methods
from .page_cache import fill_cache
from .rows import BenchRow, bench_rows
from .runner import Conditions, Model, Result, Runner, look, model_files, try_conditions

__all__ = [
    "Asked",
    "Bench",
    "BenchRow",
    "Lengths",
    "bench",
    "bench_rows",
    "draw",
    "encode",
    "parse_lengths",
    "parse_methods",
]

MEDIANS = (
    *("load_s", "ttft_s", "total_s", "peak_bytes", "ram_peak_bytes", "group_peak_bytes", "rchar", "read_bytes"),
    *("planned_peak_bytes", "bytes_per_token", "skipped", "read_bandwidth", "streamed_per_token"),
)
WHOLE = ("full", "accelerate")  # methods that run the whole model


@dataclass(frozen=True)
class Bench:
    """All measurements. `reading`, `new_memory`: bytes a second; `arithmetic`: seconds, by tokens of the prompt;
    `device`: a GPU's name, its bus and its memory in bytes a second, nothing of the CPU."""

    asked: Asked
    model: Model
    conditions: Conditions
    reading: Result
    arithmetic: dict[int, Result]
    rows: list[BenchRow]
    new_memory: Result = field(default_factory=dict)
    device: Result = field(default_factory=dict)

    def floor(self, prompt: int, *, again: bool = False) -> float | None:
        """The least seconds that a prompt can take if the whole checkpoint is read for it; None if unknown.

        `again`: where RAM holds the weights, and only the bus is between them and the device."""
        reading = {} if again else self.reading
        if "error" in reading or "error" in self.arithmetic[prompt]:
            return None
        speeds = [float(facts[name]) for facts, name in self._paths(reading) if name in facts]
        moving = self.model.file_bytes / min(speeds) if speeds else 0.0
        return max(moving, float(self.arithmetic[prompt]["seconds"]))

    def _paths(self, reading: Result) -> tuple[tuple[Result, str], ...]:
        return (reading, "bandwidth"), (self.device, "bus_bandwidth")

    def limit(self, row: BenchRow) -> float | None:
        """Tokens/s at which the memory can deliver the bytes that one token reads. The memory's bandwidth is the
        best that was measured in the row, or else in any row; on a GPU the best that was measured at all."""
        own = None if self.asked.on_gpu else max(row.values("memory_bandwidth"), default=None)
        found = [best for other in self.rows for best in other.values("memory_bandwidth")]
        found += [float(self.device["memory_bandwidth"])] if "memory_bandwidth" in self.device else []
        speed = own or max(found, default=None)
        size = row.median("bytes_per_token")
        return speed / size if speed and size else None

    def summary(self, row: BenchRow) -> Result:
        """Medians over a row's runs; None where there are none."""
        speeds, prompt_s = row.values("tokens_per_s"), row.median("prompt_s")
        speed, floor, limit = row.median("tokens_per_s"), self.floor(row.lengths.prompt), self.limit(row)
        again_s, floor_again = row.median("prompt_again_s"), self.floor(row.lengths.prompt, again=True)
        return {
            **row.facts(),
            "prompt_s": prompt_s,
            "x_floor": prompt_s / floor if prompt_s and floor else None,
            "prompt_again_s": again_s,
            "x_floor_again": again_s / floor_again if again_s and floor_again else None,
            "tokens_per_s": speed,
            "tokens_per_s_min": min(speeds, default=None),
            "tokens_per_s_max": max(speeds, default=None),
            "of_limit": speed / limit if speed and limit and speed <= limit else None,
            "limit_disturbed": bool(speed and limit and speed > limit),
            **{name: row.median(name) for name in MEDIANS},
            "same_tokens": self.same_tokens(row),
            "extrapolated": row.extrapolated,
            "runs": len(row.good),
            "note": row.note or None,
            "error": row.error or None,
        }

    def same_tokens(self, row: BenchRow) -> list[int] | None:
        """How many of the answer's first tokens are those of the whole model by transformers, and of how many that
        both have made; None where it was not run, and for its own row."""
        mine = next((run["token_ids"] for run in row.good if "token_ids" in run), None)
        others = (other for other in self.rows if other.method in WHOLE and other.lengths == row.lengths)
        runs = (run["token_ids"] for other in others for run in other.good)
        if row.method in WHOLE or mine is None or (whole := next(runs, None)) is None:
            return None
        both = min(len(mine), len(whole))
        same = next((i for i in range(both) if mine[i] != whole[i]), both)
        return [same, both]

    def machine(self) -> Result:
        """The machine, its limits, and what the runs are held to."""
        threads = next((a["threads"] for a in self.arithmetic.values() if "threads" in a), None)
        return {
            "kind": "machine",
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads,
            "ram_bytes": psutil.virtual_memory().total,
            **_versions(),
            "model": self.asked.name,
            "device": self.asked.device,
            "device_facts": self.device,
            "budget_bytes": self.asked.budget,
            "ram_asked_bytes": self.asked.ram,
            "dtype": self.asked.dtype,
            "max_seconds": self.asked.max_seconds,
            "repeats": self.asked.repeats,
            **asdict(self.model),
            "capped": not self.conditions.no_cap,
            "cold": not self.conditions.not_cold,
            "conditions": str(self.conditions),
            "reading": self.reading,
            "arithmetic": {str(prompt): found for prompt, found in self.arithmetic.items()},
        }


def bench(
    asked: Asked,
    on_note: Callable[[str], None] = lambda text: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Bench:
    """Measure everything: first the limits, then the rows in turn, `asked.repeats` times.

    `on_note` gets a line for each step, `on_result` every object of --json. Raises OptionError for lengths beyond the
    model's context, and CheckpointError; a run that fails becomes a row that says so."""
    model = look(asked)
    conditions = try_conditions(asked)
    on_note(f"{asked.name}: {conditions}")
    if asked.on_gpu and conditions.not_cold:  # with caches warm the first row must not be the one that fills them
        on_note("reading the model into the page cache")
        fill_cache(model_files(asked))
    with workspace(Path(tempfile.gettempdir())) as scratch:
        runner = Runner(asked, model, conditions, str(scratch))
        on_note("measuring the disk and the arithmetic of a prompt")
        device = runner.run("device", asked.lengths[0], cap=False) if asked.on_gpu else {}
        reading = runner.run("reading", asked.lengths[0], cap=False)
        prompts = {lengths.prompt: lengths for lengths in asked.lengths}
        arithmetic = {p: runner.run("arithmetic", lengths, cap=False) for p, lengths in prompts.items()}
        done = Bench(asked, model, conditions, reading, arithmetic, bench_rows(asked), device=device)
        on_result(done.machine())
        for number in range(1, asked.repeats + 1):  # the rows in turn: a machine that slows down slows all of them
            for row in done.rows:
                if not row.error:
                    _run_row(runner, row)
                    on_result({**row.facts(), "kind": "run", "number": number, **row.runs[-1]})
                    on_note(f"{row.label}, {row.lengths} tokens, run {number} of {asked.repeats}: {_last_run(row)}")
        if not asked.on_gpu:  # last: what it touches stays at hand for a while, and would make a run after it faster
            done.new_memory.update(runner.run("new-memory", asked.lengths[0], cap=False))
    for row in done.rows:
        on_result(done.summary(row))
    on_result({"kind": "memory", **done.new_memory})
    return done


def encode(folder: Path, text: str) -> list[int]:
    """Token ids of a user's turn in the model's chat template, or of the bare text where it has none."""
    from ...engine import Engine

    return Engine(folder, device="cpu").encode(text)


def _run_row(runner: Runner, row: BenchRow) -> None:
    """Adds a run to a row. One that was stopped early gets the total that it would have come to."""
    result = runner.refusal(row.method) or runner.run(
        row.method, row.lengths, row.pruning, row.gguf, compiles=row.compiles
    )
    if "error" in result:  # a child knows the model by its folder, people by its name
        result["error"] = str(result["error"]).replace(str(runner.asked.folder), runner.asked.name)
    else:
        speed = (result["tokens"] - 1) / result["decode_s"] if result["decode_s"] else None
        if result["tokens"] < row.lengths.answer and speed:
            result["total_s"] += (row.lengths.answer - result["tokens"]) / speed
        result["tokens_per_s"] = speed
    row.runs.append(result)


def _last_run(row: BenchRow) -> str:
    result = row.runs[-1]
    if "error" in result:
        return str(result["error"])
    again = f", again {result['prompt_again_s']:.2f} s" if "prompt_again_s" in result else ""
    return f"prompt {result['prompt_s']:.2f} s{again}, {result['tokens_per_s'] or 0:.3g} tokens/s"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "llama-cpp-python"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def draw(done: Bench, path: Path) -> None:
    """Draws bars of tokens/s and of the prompt pass, one for each row. Raises OptionError as plots.check does."""
    from ..figures.plots import COLOURS, canvas

    lines = list(reversed(done.rows))
    several = len(done.asked.lengths) > 1
    labels = [f"{row.label}, {row.lengths}" if several else row.label for row in lines]
    title = f"{done.asked.name}, {done.conditions}"
    with canvas(path, 9.6, 1.6 + 0.4 * len(lines), title) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        named = (("tokens_per_s", "tokens/s"), ("prompt_s", "prompt pass (s)"))
        for axes, (name, label), colour in zip(panels, named, COLOURS, strict=False):
            bars = axes.barh(labels, [row.median(name) or 0.0 for row in lines], color=colour)
            texts = [f"{value:.3g}" if (value := row.median(name)) else "none" for row in lines]
            axes.bar_label(bars, texts, padding=3)
            axes.set_xlabel(label)
            axes.margins(x=0.15)
            axes.grid(visible=False, axis="y")
            axes.set_axisbelow(True)
