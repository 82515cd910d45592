"""Methods side by side on one machine: each run in a fresh process, held to the same memory, with the same prompt.

What limits them is measured too: reading the checkpoint, the prompt's arithmetic, the memory's bandwidth."""

import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from ...checkpoint.gguf.link import gguf_link
from ...errors import OptionError
from ...options import SKIP_MODES, check
from ...units import MIB, format_bytes
from .competitors import OUT_OF_MEMORY, Job
from .control_group import control_group, drop_caches

METHODS = ("full", "accelerate", "magnitude", "griffin", "llama-cpp")
RESIDENT = 0.6  # of the budget, for weights that accelerate keeps: the rest is runtime and activations
Result = dict[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt, and of the answer."""

    prompt: int
    answer: int

    def __str__(self) -> str:
        return f"{self.prompt}+{self.answer}"


def parse_lengths(text: str) -> list[Lengths]:
    """'512+128,2048+256' -> lengths. Raises OptionError; an answer has at least 2 tokens, or it has no speed."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})\s*\+\s*(\d{1,7})\s*", part)
        if not match or int(match[1]) < 1 or int(match[2]) < 2:
            raise OptionError(
                f"lengths {part.strip()!r} are not PROMPT+ANSWER tokens, at least 1+2: write 512+128,2048+256"
            )
        found.append(Lengths(int(match[1]), int(match[2])))
    return list(dict.fromkeys(found))


def parse_methods(text: str | None, ggufs: Sequence[Path]) -> list[str]:
    """'full,griffin' -> names; None: all that can run. Raises OptionError."""
    if text is None:
        return [name for name in METHODS if name != "llama-cpp" or ggufs]
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        check(name, METHODS, "method")
    if "llama-cpp" in names and not ggufs:
        raise OptionError("method 'llama-cpp' reads a GGUF file of the same weights: give --llama-cpp FILE.gguf")
    return names if "llama-cpp" in names or not ggufs else [*names, "llama-cpp"]


@dataclass(frozen=True)
class Asked:
    """What to measure. `folder`: the checkpoint; `budget`: bytes, of every method; `cold` None: where root allows.

    `resident_dtypes`: of griffin's rows; `ffn_skips`: shares of skipped blocks, in more such rows; `ggufs`: files of
    the same weights for llama.cpp, a row each."""

    name: str
    folder: Path
    budget: int
    lengths: Sequence[Lengths]
    methods: Sequence[str]
    sparsities: Sequence[float]
    repeats: int = 3
    max_seconds: float = 120.0
    dtype: str | None = None
    threads: int | None = None
    resident_dtypes: Sequence[str] = ("bfloat16",)
    ffn_skips: Sequence[float] = ()
    ffn_skip_mode: str = "token"
    ggufs: Sequence[Path] = ()
    capped: bool = True
    cold: bool | None = None

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            if not 0 <= sparsity <= 1:
                raise OptionError(f"sparsity {sparsity:g} is outside its range: 0 to 1")
        for share in self.ffn_skips:
            if not 0 < share <= 1:
                raise OptionError(f"ffn-skip {share:g} is outside its range: above 0, up to 1")
        check(self.ffn_skip_mode, SKIP_MODES, "ffn-skip-mode")


@dataclass(frozen=True)
class Model:
    """Of the checkpoint, from its headers: bytes of its files, of its weights in the dtype that runs; the config's."""

    file_bytes: int
    weight_bytes: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Conditions:
    """What the runs were held to: '' where it held, else why not."""

    budget: int
    no_cap: str
    not_cold: str

    def __str__(self) -> str:
        capped = f"memory capped at {format_bytes(self.budget)} by a control group"
        memory = f"memory not capped ({self.no_cap})" if self.no_cap else capped
        return f"{memory}, " + (f"caches warm ({self.not_cold})" if self.not_cold else "caches cold")


@dataclass
class Row:
    """A method at some lengths, and its runs: those that worked hold no 'error'."""

    method: str
    sparsity: float | None
    lengths: Lengths
    resident_dtype: str = "bfloat16"
    gguf: Path | None = None
    runs: list[Result] = field(default_factory=list)
    ffn_skip: float = 0.0
    ffn_skip_mode: str = "token"

    @property
    def label(self) -> str:
        if self.sparsity is None:
            return f"{self.method} {self.gguf.stem}" if self.gguf else self.method
        packed = f" {self.resident_dtype}" if self.resident_dtype != "bfloat16" else ""
        skips = f" skip {100 * self.ffn_skip:.3g}% by {self.ffn_skip_mode}" if self.ffn_skip else ""
        return f"{self.method} {100 * self.sparsity:.3g}%{packed}{skips}"

    @property
    def good(self) -> list[Result]:
        return [run for run in self.runs if "error" not in run]

    @property
    def error(self) -> str:
        return next((str(run["error"]) for run in self.runs if "error" in run), "")

    @property
    def extrapolated(self) -> bool:
        """Whether a run was stopped before it had made all tokens."""
        return any(run["tokens"] < self.lengths.answer for run in self.good)

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.good if run.get(name)]

    def median(self, name: str) -> float | None:
        return statistics.median(found) if (found := self.values(name)) else None


@dataclass(frozen=True)
class Bench:
    """All that was measured. `reading`, `new_memory`: bytes a second; `arithmetic`: seconds by tokens of the prompt."""

    asked: Asked
    model: Model
    conditions: Conditions
    reading: Result
    arithmetic: dict[int, Result]
    rows: list[Row]
    new_memory: Result = field(default_factory=dict)

    def floor(self, prompt: int) -> float | None:
        """Seconds that a prompt takes at the least, when the whole checkpoint is read for it; None if unknown."""
        if "error" in self.reading or "error" in self.arithmetic[prompt]:
            return None
        return max(self.model.file_bytes / float(self.reading["bandwidth"]), float(self.arithmetic[prompt]["seconds"]))

    def limit(self, row: Row) -> float | None:
        """Tokens/s at which the memory can deliver what one token reads; its speed as this row or any measured it."""
        speed = row.median("memory_bandwidth") or max(
            (best for other in self.rows for best in other.values("memory_bandwidth")), default=None
        )
        size = row.median("bytes_per_token")
        return speed / size if speed and size else None

    def summary(self, row: Row) -> Result:
        """Medians over a row's runs; None where there are none."""
        speeds, prompt_s = row.values("tokens_per_s"), row.median("prompt_s")
        speed, floor, limit = row.median("tokens_per_s"), self.floor(row.lengths.prompt), self.limit(row)
        names = ("load_s", "ttft_s", "total_s", "peak_bytes", "group_peak_bytes", "rchar", "read_bytes")
        return {
            **_what(row),
            "prompt_s": prompt_s,
            "x_floor": prompt_s / floor if prompt_s and floor else None,
            "tokens_per_s": speed,
            "tokens_per_s_min": min(speeds, default=None),
            "tokens_per_s_max": max(speeds, default=None),
            "of_limit": speed / limit if speed and limit else None,
            **{name: row.median(name) for name in names},
            "planned_peak_bytes": row.median("planned_peak_bytes"),
            "bytes_per_token": row.median("bytes_per_token"),
            "skipped": row.median("skipped"),
            "read_bandwidth": row.median("read_bandwidth"),
            "extrapolated": row.extrapolated,
            "runs": len(row.good),
            "error": row.error or None,
        }

    def machine(self) -> Result:
        """The machine, what it can do, and what runs were held to."""
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
            "budget_bytes": self.asked.budget,
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
    """Measure everything: the limits first, then the rows in turn, as often as asked.

    `on_note` hears what is being done, `on_result` every object of --json. Raises OptionError for lengths that the
    model cannot take, CheckpointError; a run that fails is a row that says so."""
    model = look(asked)
    conditions = _conditions(asked)
    on_note(f"{asked.name}: {conditions}")
    with tempfile.TemporaryDirectory(prefix="griffin-bench-") as scratch:
        runner = _Runner(asked, model, conditions, scratch)
        on_note("measuring the disk and the arithmetic of a prompt")
        reading = runner.run("reading", asked.lengths[0], cap=False)
        prompts = {lengths.prompt: lengths for lengths in asked.lengths}
        arithmetic = {p: runner.run("arithmetic", lengths, cap=False) for p, lengths in prompts.items()}
        done = Bench(asked, model, conditions, reading, arithmetic, _rows(asked))
        on_result(done.machine())
        for number in range(1, asked.repeats + 1):  # the rows in turn: a machine that slows down slows all of them
            for row in done.rows:
                if not row.error:
                    _run_row(runner, row, number, on_note, on_result)
        # Last: what it touches stays at hand for a while, and would make a run after it faster.
        done.new_memory.update(runner.run("new-memory", asked.lengths[0], cap=False))
    for row in done.rows:
        on_result(done.summary(row))
    on_result({"kind": "memory", **done.new_memory})
    return done


def with_name(asked: Asked, result: Result) -> Result:
    """A child knows the model by its folder; people know it by its name."""
    if "error" in result:
        result["error"] = str(result["error"]).replace(str(asked.folder), asked.name)
    return result


def look(asked: Asked) -> Model:
    """The checkpoint's headers and config. Raises CheckpointError, and OptionError for lengths beyond its context."""
    import torch

    from ...model.config_facts import context_length
    from ...model.pretrained import load_config, open_checkpoint

    checkpoint, config = open_checkpoint(asked.folder), load_config(asked.folder)
    infos = checkpoint.tensors.values()
    item = getattr(torch, asked.dtype).itemsize if asked.dtype else 0
    weights = sum(math.prod(info.shape) * (item or info.dtype.itemsize) for info in infos)
    context = context_length(config)
    for lengths in asked.lengths:
        if lengths.prompt + lengths.answer > context:
            raise OptionError(f"{lengths} tokens are more than {asked.name} can take: {context}, answer included")
    return Model(checkpoint.bytes, weights, int(config.vocab_size), context)


def _rows(asked: Asked) -> list[Row]:
    rows = []
    for lengths in asked.lengths:
        for method in asked.methods:
            if method == "griffin":
                each = product(asked.sparsities, asked.resident_dtypes, (0.0, *asked.ffn_skips))
                mode = asked.ffn_skip_mode
                rows += [Row(method, s, lengths, d, ffn_skip=skip, ffn_skip_mode=mode) for s, d, skip in each]
            elif method == "llama-cpp":
                rows += [Row(method, None, lengths, gguf=gguf) for gguf in asked.ggufs]
            else:
                rows.append(Row(method, asked.sparsities[0] if method == "magnitude" else None, lengths))
    return rows


def _run_row(
    runner: "_Runner", row: Row, number: int, on_note: Callable[[str], None], on_result: Callable[[Result], None]
) -> None:
    result = runner.refusal(row.method) or with_name(runner.asked, runner.run(row.method, row.lengths, row))
    if "error" not in result:
        made = result["tokens"] - 1
        speed = made / result["decode_s"] if result["decode_s"] else None
        if result["tokens"] < row.lengths.answer and speed:
            result["total_s"] += (row.lengths.answer - result["tokens"]) / speed
        result["tokens_per_s"] = speed
    row.runs.append(result)
    on_result({**_what(row), "kind": "run", "number": number, **result})
    said = result.get("error") or f"prompt {result['prompt_s']:.2f} s, {result['tokens_per_s'] or 0:.3g} tokens/s"
    on_note(f"{row.label}, {row.lengths} tokens, run {number} of {runner.asked.repeats}: {said}")


def _what(row: Row) -> Result:
    tokens = {"prompt_tokens": row.lengths.prompt, "answer_tokens": row.lengths.answer}
    how = {"sparsity": row.sparsity, "resident_dtype": row.resident_dtype, "file": row.gguf and row.gguf.name}
    skips = {"ffn_skip": row.ffn_skip, "ffn_skip_mode": row.ffn_skip_mode} if row.ffn_skip else {}
    return {"kind": "row", "method": row.method, **how, **skips, **tokens}


class _Runner:
    """Starts a child for each run."""

    def __init__(self, asked: Asked, model: Model, conditions: Conditions, scratch: str) -> None:
        self.asked, self.model, self.conditions, self.scratch = asked, model, conditions, scratch

    def refusal(self, method: str) -> Result | None:
        """Why a run is not tried at all."""
        if method == "full" and self.conditions.no_cap and self.model.weight_bytes > self.asked.budget:
            weights = f"{format_bytes(self.model.weight_bytes)} of weights, more than the budget"
            return {"error": f"not run: {weights}, and no control group to hold it"}
        if method in ("full", "accelerate") and gguf_link(self.asked.folder):
            return {"error": "not run: it reads safetensors, and the model is a GGUF file"}
        return None

    def run(self, method: str, lengths: Lengths, row: Row | None = None, cap: bool = True) -> Result:
        """What a child measured, or {'error': why not}."""
        asked, cold = self.asked, not self.conditions.not_cold
        job = Job(
            method=method,
            model=str(row.gguf if row and row.gguf else asked.folder),
            prompt_tokens=lengths.prompt,
            answer_tokens=lengths.answer,
            vocabulary=self.model.vocabulary,
            budget=asked.budget,
            resident=max(MIB, int(asked.budget * RESIDENT) // MIB * MIB),
            sparsity=row.sparsity if row else None,
            resident_dtype=row.resident_dtype if row else "bfloat16",
            max_seconds=asked.max_seconds,
            dtype=asked.dtype,
            scratch=self.scratch,
            cold=cold,
            ffn_skip=row.ffn_skip if row else 0.0,
            ffn_skip_mode=row.ffn_skip_mode if row else "token",
        )
        command = [sys.executable, "-m", "griffin_offload.evaluation.bench.competitors", job.to_json()]
        if cold:
            drop_caches()
        patience = 600 + 10 * asked.max_seconds  # for loading and the prompt too, under a cap that makes both crawl
        if not cap or self.conditions.no_cap:
            return run_child(command, patience, asked.threads)
        with control_group(asked.budget) as group:
            result = run_child(group.enter(command), patience, asked.threads)
            if "signal" in result and group.kills():
                result = {"error": f"{OUT_OF_MEMORY} at {format_bytes(asked.budget)}"}
            return result | {"group_peak_bytes": group.peak()}


def run_child(command: Sequence[str], patience: float, threads: int | None = None) -> Result:
    """The JSON line that a child prints, or {'error': what became of it}, with 'signal' where one ended it."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, env=env, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped: not done after {patience:.0f} s"}
    if done.returncode < 0:  # a signal's number
        name = signal.Signals(-done.returncode).name
        return {"error": f"the process was ended by {name}", "signal": name}
    with suppress(ValueError):
        return dict(json.loads(done.stdout))
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return {"error": f"the process failed ({done.returncode}): {lines[-1][:200] if lines else 'it said nothing'}"}


def _conditions(asked: Asked) -> Conditions:
    """What can be held here: tried, not assumed."""
    no_cap = "" if asked.capped else "as asked"
    if asked.capped:
        try:
            with control_group(asked.budget):
                pass
        except OSError as error:
            no_cap = f"no control group: {(error.strerror or str(error)).lower()}"
    not_cold = "as asked" if asked.cold is False else ""
    if not not_cold:
        try:
            drop_caches()
        except OSError as error:
            not_cold = f"they cannot be dropped: {(error.strerror or str(error)).lower()}"
    return Conditions(asked.budget, no_cap, not_cold)


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
    """Bars of tokens/s and of the prompt pass, one of each a row. Raises OptionError like plots.check."""
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
