"""Runs each method in a child process, with a memory limit and cold file caches where the system allows them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.gguf.link import gguf_link
from ...errors import OptionError
from ...options import Pruning
from ...sources.resolve import weight_files
from ...units import MIB, format_bytes
from .asked import Asked, Lengths
from .competitors import OUT_OF_MEMORY
from .control_group import control_group
from .job import Job
from .page_cache import drop_caches, drop_files

RESIDENT = 0.6  # of the budget, for weights that accelerate keeps: the rest is runtime and activations
ON_GPU = 0.9  # the same where the budget is a GPU's, which holds no runtime; accelerate's own share too
Result = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A checkpoint by its headers and config. `file_bytes`: of its files; `weight_bytes`: in the dtype that runs."""

    file_bytes: int
    weight_bytes: int
    vocabulary: int
    context: int
    layers: int = 0


def look(asked: Asked) -> Model:
    """Reads the checkpoint's headers and config. Raises CheckpointError, and OptionError for lengths beyond its
    context."""
    import torch

    from ...model.config_facts import context_length
    from ...model.pretrained import read_headers

    headers = read_headers(asked.folder)
    config, checkpoint = headers.config, headers.checkpoint
    infos = checkpoint.tensors.values()
    item = getattr(torch, asked.dtype).itemsize if asked.dtype else 0
    weights = sum(math.prod(info.shape) * (item or info.dtype.itemsize) for info in infos)
    context = context_length(config)
    for lengths in asked.lengths:
        if lengths.prompt + lengths.answer > context:
            raise OptionError(f"{lengths} tokens are more than {asked.name} can take: {context}, answer included")
    return Model(checkpoint.bytes, weights, int(config.vocab_size), context, int(config.num_hidden_layers))


@dataclass(frozen=True)
class Conditions:
    """What the runs are held to. `no_cap`, `not_cold`: why memory is not capped, and caches are not cold; '' if they
    are. `by`: what caps it."""

    budget: int
    no_cap: str
    not_cold: str
    by: str = "a control group"

    def __str__(self) -> str:
        capped = f"memory capped at {format_bytes(self.budget)} by {self.by}"
        memory = f"memory not capped ({self.no_cap})" if self.no_cap else capped
        return f"{memory}, " + (f"caches warm ({self.not_cold})" if self.not_cold else "caches cold")


def try_conditions(asked: Asked) -> Conditions:
    """What this system can hold runs to: tried, not assumed."""
    no_cap, by = "" if asked.capped else "as asked", "a control group"
    if asked.capped and asked.on_gpu:
        by = "torch's allocator (accelerate) and its plan (griffin); full is not capped"
        no_cap = "" if asked.device == "cuda" else f"torch has no limit for {asked.device}"
    elif asked.capped:
        try:
            with control_group(asked.budget):
                pass
        except OSError as error:
            no_cap = f"no control group: {(error.strerror or str(error)).lower()}"
    not_cold = "as asked" if asked.cold is False else ""
    if not not_cold:
        try:
            make_cold(asked)
        except OSError as error:
            not_cold = f"they cannot be dropped: {(error.strerror or str(error)).lower()}"
    return Conditions(asked.budget, no_cap, not_cold, by)


def make_cold(asked: Asked) -> None:
    """Drops the page cache; for a GPU the model's files alone: torch's own libraries for it are gigabytes, and would
    be read during the prompt pass. Raises OSError."""
    if asked.on_gpu:
        drop_files(model_files(asked))
    else:
        drop_caches()


def model_files(asked: Asked) -> list[Path]:
    """Every file of weights that a method reads."""
    return [*weight_files(asked.folder), *asked.ggufs]


class Runner:
    """Starts a child process for each run. `scratch`: a folder for what children write."""

    def __init__(self, asked: Asked, model: Model, conditions: Conditions, scratch: str) -> None:
        self.asked, self.model, self.conditions, self.scratch = asked, model, conditions, scratch
        self.end = None if asked.stop_after is None else time.monotonic() + asked.stop_after

    def refusal(self, method: str) -> Result | None:
        """{'error': why a method is not tried at all}, or None."""
        asked, size = self.asked, self.model.weight_bytes
        if method == "full" and not asked.on_gpu and self.conditions.no_cap and size > asked.budget:
            weights = f"{format_bytes(size)} of weights, more than the budget"
            return {"error": f"not run: {weights}, and no control group to hold it"}
        if method in ("full", "accelerate") and gguf_link(asked.folder):
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
        compiles: bool = False,
    ) -> Result:
        """What a child measured, or {'error': why not}."""
        asked, cold = self.asked, not self.conditions.not_cold
        patience = 600 + 10 * asked.max_seconds  # for loading and the prompt too, under a cap that makes both crawl
        if self.end is not None:
            patience = min(patience, self.end - time.monotonic())
            if patience <= 0:
                return {"error": f"not run: {asked.stop_after:.3g} s were over"}
        job = self._job(method, lengths, pruning or Pruning(), gguf, compiles)
        command = [sys.executable, "-m", "griffin_offload.evaluation.bench.competitors", job.to_json()]
        env = {} if asked.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}  # libraries would take a GPU unasked
        if asked.threads:
            env |= {"OMP_NUM_THREADS": str(asked.threads), "MKL_NUM_THREADS": str(asked.threads)}
        if cold:
            make_cold(asked)
        if not cap or self.conditions.no_cap or asked.on_gpu:
            return run_child(command, patience, env)
        with control_group(asked.budget) as group:
            result = run_child(group.enter(command), patience, env)
            if "signal" in result and group.kills():
                result = {"error": f"{OUT_OF_MEMORY} at {format_bytes(asked.budget)}"}
            return result | {"group_peak_bytes": group.peak()}

    def _job(self, method: str, lengths: Lengths, pruning: Pruning, gguf: Path | None, compiles: bool) -> Job:
        asked = self.asked
        resident = int(asked.budget * (ON_GPU if asked.on_gpu else RESIDENT))
        return Job(
            method=method,
            model=str(gguf or asked.folder),
            prompt_tokens=lengths.prompt,
            answer_tokens=lengths.answer,
            vocabulary=self.model.vocabulary,
            budget=asked.budget,
            resident=max(MIB, resident // MIB * MIB),
            max_seconds=asked.max_seconds,
            dtype=asked.dtype,
            scratch=self.scratch,
            cold=not self.conditions.not_cold,
            pruning=pruning,
            device=asked.device,
            ram=asked.ram,
            capped=not self.conditions.no_cap,
            gpu_layers=gpu_layers(gguf.stat().st_size, resident, self.model.layers) if gguf else 0,
            compiles=compiles,
            threads=asked.threads,
            ids=list(asked.prompt),
        )


def gpu_layers(size: int, room: int, layers: int) -> int:
    """Layers of a GGUF file of `size` bytes that fit into `room` bytes of a GPU; -1: all, and lm_head too."""
    return -1 if size <= room else layers * room // size


def run_child(command: Sequence[str], patience: float, env: Mapping[str, str] | None = None) -> Result:
    """The JSON line that a child prints, or {'error': what happened to it}, with 'signal' where one ended it."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **quiet, **(env or {})}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped: not done after {patience:.0f} s"}
    if done.returncode < 0:  # a signal's number
        name = signal.Signals(-done.returncode).name
        return {"error": f"the process was ended by {name}", "signal": name}
    with suppress(ValueError):
        return dict(json.loads(done.stdout))
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return {"error": f"the process failed ({done.returncode}): {lines[-1][:200] if lines else 'it said nothing'}"}
