"""Runs each method in a child process, with a memory limit and cold file caches where the system allows them."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.gguf.link import gguf_link
from ...errors import OptionError
from ...options import Pruning
from ...units import MIB, format_bytes
from .asked import Asked, Lengths
from .competitors import OUT_OF_MEMORY, Job
from .control_group import control_group, drop_caches

RESIDENT = 0.6  # of the budget, for weights that accelerate keeps: the rest is runtime and activations
Result = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A checkpoint by its headers and config. `file_bytes`: of its files; `weight_bytes`: in the dtype that runs."""

    file_bytes: int
    weight_bytes: int
    vocabulary: int
    context: int


def look(asked: Asked) -> Model:
    """Reads the checkpoint's headers and config. Raises CheckpointError, and OptionError for lengths beyond its
    context."""
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


@dataclass(frozen=True)
class Conditions:
    """What the runs are held to. `no_cap`, `not_cold`: why memory is not capped, and caches are not cold; '' if they
    are."""

    budget: int
    no_cap: str
    not_cold: str

    def __str__(self) -> str:
        capped = f"memory capped at {format_bytes(self.budget)} by a control group"
        memory = f"memory not capped ({self.no_cap})" if self.no_cap else capped
        return f"{memory}, " + (f"caches warm ({self.not_cold})" if self.not_cold else "caches cold")


def try_conditions(asked: Asked) -> Conditions:
    """What this system can hold runs to: tried, not assumed."""
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


class Runner:
    """Starts a child process for each run. `scratch`: a folder for what children write."""

    def __init__(self, asked: Asked, model: Model, conditions: Conditions, scratch: str) -> None:
        self.asked, self.model, self.conditions, self.scratch = asked, model, conditions, scratch

    def refusal(self, method: str) -> Result | None:
        """{'error': why a method is not tried at all}, or None."""
        if method == "full" and self.conditions.no_cap and self.model.weight_bytes > self.asked.budget:
            weights = f"{format_bytes(self.model.weight_bytes)} of weights, more than the budget"
            return {"error": f"not run: {weights}, and no control group to hold it"}
        if method in ("full", "accelerate") and gguf_link(self.asked.folder):
            return {"error": "not run: it reads safetensors, and the model is a GGUF file"}
        return None

    def run(
        self,
        method: str,
        lengths: Lengths,
        pruning: Pruning | None = None,
        gguf: Path | None = None,
        *,
        cap: bool = True,
    ) -> Result:
        """What a child measured, or {'error': why not}."""
        asked, cold = self.asked, not self.conditions.not_cold
        job = Job(
            method=method,
            model=str(gguf or asked.folder),
            prompt_tokens=lengths.prompt,
            answer_tokens=lengths.answer,
            vocabulary=self.model.vocabulary,
            budget=asked.budget,
            resident=max(MIB, int(asked.budget * RESIDENT) // MIB * MIB),
            max_seconds=asked.max_seconds,
            dtype=asked.dtype,
            scratch=self.scratch,
            cold=cold,
            pruning=pruning or Pruning(),
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
    """The JSON line that a child prints, or {'error': what happened to it}, with 'signal' where one ended it."""
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
