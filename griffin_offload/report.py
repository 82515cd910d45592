"""A run's plan and measurements: rows for people, JSON for programs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import GriffinError
from .files import reason, write_text
from .memory.stage_clock import Stages
from .model.format_speeds import DISTURBED
from .model.static_step import Steps
from .planning.lossless import Lossless
from .planning.plan import Plan
from .planning.refresh import Refreshes
from .planning.turn import Shared, Turn
from .pruning.ffn_skip import SkippedBlocks
from .pruning.fidelity import Fidelity
from .quant.formats import FORMATS, kernel
from .small_json import read_object
from .units import format_bytes, format_rate


@dataclass(frozen=True)
class Report:
    """One run, in bytes, seconds and bytes per second. A run whose weights were all resident has read nothing.

    `read_s`: seconds that the reader was busy while the model computed; `stages`: of the prompt pass, None where no
    layer had to be read. `measured_host`: RAM for layers, and to read them, beside a device with memory of its own;
    `locked_host`: of this what was page-locked when the pass began, so that a GPU copied it by itself.
    `memory_bandwidth`: of one token's products over the resident weights, measured after the answer; 0 for too few
    tokens. `prior`: facts and weight of the prior that the choice of neurons used. `steps`: how tokens were decoded by
    static steps; None: not by any. `fidelity`: how close the resident model is to the full one; None: it is the full
    one, or was not to be measured. `helps`: options that would keep more of it, and fit, where it keeps little.
    `threads`: on how many most of the tokens were decoded, on a CPU. `overridden`: fields of the checkpoint's configs
    that do not act here, and why. `turn`: of a conversation that goes on; None: of none. `shared`: what the prompts of
    a batch began with alike; `prompt_s`, `bytes_read` and `measured_peak` are with its pass. `lossless`: how the answer
    was drafted and verified, `refreshes`: how its neurons were chosen again; None: that was not asked for.
    `measured_on_each`: of several devices, the peak on each of the plan's `cards`; `measured_peak` is their sum."""

    model: str
    model_path: Path
    dtype: str
    device: str
    plan: Plan
    measured_peak: int
    checkpoint_bytes: int
    bytes_read: int
    plan_s: float
    prompt_s: float
    read_s: float
    decode_s: float
    time_to_first_token_s: float
    tokens: int
    memory_bandwidth: float
    stages: Stages | None = None
    measured_host: int = 0
    locked_host: int = 0
    prior: dict[str, Any] | None = None
    skipped: SkippedBlocks | None = None
    steps: Steps | None = None
    fidelity: Fidelity | None = None
    helps: tuple[str, ...] = ()
    threads: int | None = None
    turn: Turn | None = None
    shared: Shared | None = None
    lossless: Lossless | None = None
    refreshes: Refreshes | None = None
    overridden: tuple[str, ...] = ()
    measured_on_each: tuple[int, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a token of the answer reads, on average."""
        return self.plan.bytes_per_token - (self.skipped.bytes if self.skipped else 0)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, per second."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s else 0.0

    @property
    def read_bandwidth(self) -> float:
        return self.bytes_read / self.read_s if self.read_s else 0.0

    @property
    def limit_tokens_per_s(self) -> float:
        """Tokens per second if memory bandwidth were the only limit: a token reads every resident byte once."""
        return self.memory_bandwidth / self.bytes_per_token

    @property
    def fraction_of_limit(self) -> float:
        return self.decode_tokens_per_s / self.limit_tokens_per_s if self.memory_bandwidth else 0.0

    @property
    def formats(self) -> str:
        """The format of each group of resident weights."""
        formats = self.plan.precision
        if not formats.quantized:
            return self.dtype
        named = {"kept neurons": formats.kept, "the other neurons": formats.rest}
        named |= {"attention": formats.others, "lm_head": formats.head}
        return ", ".join(f"{what} {format or self.dtype}" for what, format in named.items() if format is not None)

    @property
    def warning(self) -> str | None:
        """What to do where the resident model keeps too little of the full one; None where it keeps enough."""
        if not self.fidelity or not self.fidelity.is_low:
            return None
        text = "the answer may be far from the full model's"
        return f"{text}; it fits with {', or with '.join(self.helps)}" if self.helps else text

    @property
    def kernels(self) -> dict[str, str]:
        """What multiplies a token in each quantized format of the resident weights."""
        formats = self.plan.precision
        names = dict.fromkeys(name for name in (formats.kept, formats.rest, formats.others, formats.head) if name)
        return {name: kernel(name, self.device, getattr(torch, self.dtype)) for name in names if name in FORMATS}

    def to_json(self) -> dict[str, Any]:
        """`--json` without the text."""
        prior = {} if self.prior is None else {"prior": self.prior}
        return {
            "model": self.model,
            "model_path": str(self.model_path),
            "sparsity": self.plan.sparsity,
            "calibrated": self.plan.calibrated,
            "dtype": self.dtype,
            "device": self.device,
            "precision": self.plan.precision.to_json(self.dtype),
            "rest": self.plan.rest_to_json(),
            "kernels": self.kernels,
            "timings": {
                "plan_s": self.plan_s,
                "prompt_s": self.prompt_s,
                "read_s": self.read_s,
                "decode_s": self.decode_s,
                "time_to_first_token_s": self.time_to_first_token_s,
                "decode_tokens_per_s": self.decode_tokens_per_s,
                "limit_tokens_per_s": self.limit_tokens_per_s,
                "expected_tokens_per_s": self.plan.tokens_per_s,
                "threads": self.threads,
            },
            "memory": {
                "full_bytes": self.plan.full_bytes,
                "resident_bytes": self.plan.resident_bytes,
                "bytes_per_token": self.bytes_per_token,
                "host_bytes": self.plan.host_bytes,
                "planned_host_peak_bytes": self.plan.host_peak,
                "measured_host_peak_bytes": self.measured_host if self.plan.host_peak else 0,
                "host_locked_bytes": self.locked_host,
                "planned_peak_bytes": self.plan.peak,
                "measured_peak_bytes": self.measured_peak,
                "budget_bytes": self.plan.budget,
                "cards": [
                    {**card.to_json(rows=False), "measured_peak_bytes": peak}
                    for card, peak in zip(self.plan.cards, self.measured_on_each, strict=True)
                ],
            },
            "io": {
                "checkpoint_bytes": self.checkpoint_bytes,
                "bytes_read": self.bytes_read,
                "stages": self.stages and self.stages.to_json(),
            },
            "experts": {"kept_per_layer": [layer.kept for layer in self.plan.layers], "layers": len(self.plan.layers)},
            **prior,
            "fold": self.plan.fold,
            "ffn_skip": self.skipped and self.skipped.to_json(),
            "fidelity": self.fidelity and {**self.fidelity.to_json(), "warning": self.warning},
            "steps": self.steps and self.steps.to_json(),
            "turn": self.turn and self.turn.to_json(),
            "shared": self.shared and self.shared.to_json(),
            "lossless": self.lossless and self.lossless.to_json(),
            "refreshes": self.refreshes and self.refreshes.to_json(),
            "overridden": list(self.overridden),
        }

    def rows(self) -> list[tuple[str, str]]:
        """(label, value) rows for people."""
        plan = self.plan
        saved = plan.full_bytes - plan.resident_bytes
        shared = " (by layer, as calibrated)" if plan.calibrated else ""
        rows = [
            ("full model", format_bytes(plan.full_bytes)),
            ("resident", f"{format_bytes(plan.resident_bytes)} at sparsity {plan.sparsity:g}{shared}, {self.formats}"),
            *([("the rest", plan.rest_and_why)] if plan.rest else []),
            *([("fold", plan.fold_in_words)] if plan.fold_in_words else []),
            ("saved", f"{format_bytes(saved)} ({saved / plan.full_bytes:.0%})"),
            ("peak memory", f"{format_bytes(self.measured_peak)} measured, {format_bytes(plan.peak)} predicted"),
            ("budget", f"{format_bytes(plan.budget)} on {plan.where or self.device}"),
        ]
        for card, peak in zip(plan.cards, self.measured_on_each, strict=True):
            peaks = f"{format_bytes(peak)} measured, {format_bytes(card.peak)} predicted"
            rows.append((str(card.card), f"{card.layers}: {peaks}, budget {format_bytes(card.card.budget)}"))
        told = (("fidelity", self.fidelity), ("warning", self.warning))
        rows += [(label, str(value)) for label, value in told if value]
        if self.prior is not None:
            rows.append(("prior", prior_in_words(self.prior)))
        if plan.host_peak:
            rows.append(
                ("RAM", f"{format_bytes(self.measured_host)} measured, {format_bytes(plan.host_peak)} predicted")
            )
        if plan.host_bytes:
            held = f"{plan.held_layers} of {len(plan.layers)} layers' feed-forward"
            locked = f"; {format_bytes(self.locked_host)} were page-locked" if self.locked_host else ""
            rows.append(("kept in RAM", f"{format_bytes(plan.host_bytes)}: {held}, for the next prompt{locked}"))
        if self.bytes_read:
            share = self.bytes_read / self.checkpoint_bytes
            rows.append(("read", f"{format_bytes(self.bytes_read)} ({share:.3f} x the checkpoint)"))
            rows.append(("read bandwidth", f"{format_rate(self.read_bandwidth)} (reader busy {self.read_s:.2f} s)"))
        passed = self.turn or f"{plan.prompt_tokens} tokens"
        rows.append(("prompt pass", f"{self.prompt_s:.2f} s, {passed}"))
        if self.stages:
            rows.append(("bound by", str(self.stages)))
        if self.tokens:
            rows.append(("first token", f"after {self.time_to_first_token_s:.2f} s"))
        if self.tokens > 1:
            rows.extend(self._decoding())
        if self.refreshes:
            rows.append(("refreshed", str(self.refreshes)))
        if self.lossless:
            rows.append(("lossless", str(self.lossless)))
        if self.skipped:
            rows.append(("skipped blocks", str(self.skipped)))
        rows += [("not used", field) for field in self.overridden]
        return rows

    def _decoding(self) -> Iterator[tuple[str, str]]:
        expected = self.plan.tokens_per_s
        pace = f"{self.decode_tokens_per_s:.1f} tokens/s"
        if expected and self.decode_tokens_per_s <= DISTURBED * expected:
            pace += f" ({expected:.1f} expected)"
        if self.fraction_of_limit > 1:
            pace += "; the measurement of the memory bandwidth was disturbed"
        elif self.memory_bandwidth:
            pace += f", {self.fraction_of_limit:.0%} of the {self.limit_tokens_per_s:.1f} that "
            pace += f"{format_rate(self.memory_bandwidth)} of memory bandwidth allows"
        yield "decoding", pace + (f", threads: {self.threads}" if self.threads else "")
        if kernels := self.kernels:
            yield "kernels", ", ".join(f"{name} by {by}" for name, by in kernels.items())
        if self.steps and (self.steps.tokens or self.steps.why_dynamic):
            yield "steps", str(self.steps)


def prior_in_words(facts: Mapping[str, Any]) -> str:
    """'score griffin of 12 samples, weight 0.4', and how long it took to measure, if that was now."""
    words = f"score {facts.get('score')} of {facts.get('samples')} samples, weight {facts['weight']:.2g}"
    return words + (f"; measured once for this model, in {facts['measured_s']:.1f} s" if "measured_s" in facts else "")


def save_last(report: Report, folder: Path) -> None:
    """Saves a run for `mem-report --last`: plan and measurement, not the text. Raises OSError."""
    content = {**report.to_json(), "plan": report.plan.to_json()}
    write_text(folder / "last.json", json.dumps(content, indent=1))


def load_last(folder: Path) -> dict[str, Any]:
    """The run that `save_last` saved. Raises GriffinError if there is none."""
    try:
        return read_object(folder / "last.json")
    except FileNotFoundError:
        raise GriffinError("no run is remembered yet: griffin generate leaves one behind") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GriffinError(
            f"{folder / 'last.json'} cannot be read ({reason(error)}); the next run writes a new one"
        ) from None
