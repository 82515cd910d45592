"""The rows of a benchmark: a method at some lengths, and its runs."""

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...options import AUTO, RESIDENT_DTYPES, Pruning
from .asked import Asked, Lengths
from .runner import Result


@dataclass
class BenchRow:
    """A method at some lengths, and its runs; a run that failed holds an 'error'."""

    method: str
    lengths: Lengths
    pruning: Pruning | None = None
    gguf: Path | None = None
    compiles: bool = False
    runs: list[Result] = field(default_factory=list)

    @property
    def label(self) -> str:
        if self.pruning is None:
            return f"{self.method} {self.gguf.stem}" if self.gguf else self.method
        facts = self.facts()
        if facts["sparsity"] is None:
            return f"{self.method} without options"
        dtype = f" {facts['resident_dtype']}" if facts["resident_dtype"] != RESIDENT_DTYPES[0] else ""
        rest = f" rest {facts['rest']}" if self.method == "griffin" and "rest" in facts else ""
        skips = f" skip {100 * facts['ffn_skip']:.3g}% by {facts['ffn_skip_mode']}" if "ffn_skip" in facts else ""
        compiled = " compiled" if self.compiles else ""
        return f"{self.method} {100 * facts['sparsity']:.3g}%{dtype}{rest}{skips}{compiled}"

    def facts(self) -> Result:
        """What the row is, as JSON names it."""
        pruning = self.pruning or Pruning(resident_dtype=RESIDENT_DTYPES[0])
        skip = {"ffn_skip": pruning.skip.share, "ffn_skip_mode": pruning.skip.mode} if pruning.skip.share else {}
        return {
            "kind": "row",
            "method": self.method,
            "sparsity": pruning.sparsity,
            "resident_dtype": pruning.resident_dtype,
            "file": self.gguf and self.gguf.name,
            **({"rest": pruning.rest} if pruning.rest not in (None, AUTO) else {}),
            **({"compiled": True} if self.compiles else {}),
            **skip,
            "prompt_tokens": self.lengths.prompt,
            "answer_tokens": self.lengths.answer,
        }

    @property
    def good(self) -> list[Result]:
        return [run for run in self.runs if "error" not in run]

    @property
    def error(self) -> str:
        return next((str(run["error"]) for run in self.runs if "error" in run), "")

    @property
    def note(self) -> str:
        """What a run says of itself beside its numbers."""
        return next((str(run["note"]) for run in self.runs if "note" in run), "")

    @property
    def extrapolated(self) -> bool:
        """Whether a run was stopped before it had made all tokens."""
        return any(run["tokens"] < self.lengths.answer for run in self.good)

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.good if run.get(name)]

    def median(self, name: str) -> float | None:
        return statistics.median(found) if (found := self.values(name)) else None


def bench_rows(asked: Asked) -> list[BenchRow]:
    """The rows to measure, still without runs."""
    rows = []
    for lengths in asked.lengths:
        for method in asked.methods:
            if method == "griffin":
                rows += [BenchRow(method, lengths, pruning) for pruning in asked.prunings]
                first = replace(asked.prunings[0], rest="drop")  # quantized weights are not compiled
                rows += [BenchRow(method, lengths, first, compiles=True)] if asked.compiles else []
            elif method == "magnitude":
                pruning = Pruning(asked.sparsities[0], RESIDENT_DTYPES[0], "drop", "magnitude", fold=False)
                rows.append(BenchRow(method, lengths, pruning))
            elif method == "llama-cpp":
                rows += [BenchRow(method, lengths, gguf=gguf) for gguf in asked.ggufs]
            else:
                rows.append(BenchRow(method, lengths))
    return rows
