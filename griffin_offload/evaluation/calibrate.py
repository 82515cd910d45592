"""How much each layer's neurons matter to a checkpoint: the curves that `allocation.py` shares neurons by.

A window of text is a prompt, which chooses the experts as always, and a continuation. The full model reads both; then,
for each layer, a batch reads the continuation again, a row for each share of that layer's neurons, every other layer
whole. What is measured is the KL divergence of the output. All these forwards run in lock-step, so that the weights
are read once for all of them.

R rows, C continuation tokens, N = R C, F neurons, E routed experts, V vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..allocation import Curves, calibration_path, checkpoint_key, load_curves, save_curves
from ..engine import Engine
from ..errors import NumericError, OptionError
from ..hooks import Tap
from ..models import cache_folder
from ..prefill import OnLayer
from ..selection import select_experts
from ..statistic import neuron_statistic
from ..units import GIB, MIB
from .branch import branch, prompt_cache
from .observe import cut_prompts
from .scored import POSITIONS

# Charles Darwin, On the Origin of Species (1859); Edward Gibbon, The History of the Decline and Fall of the Roman
# Empire (1776); the Declaration of Independence of the United States (1776); Jane Austen, Pride and Prejudice (1813);
# Herman Melville, Moby-Dick (1851); Abraham Lincoln, the Gettysburg Address (1863). All are in the public domain.
TEXT = Path(__file__).with_name("calibration.txt")
SHARES = tuple(i / 8 for i in range(9))
LOGITS = 256 * MIB  # at most, of one forward: it has as many rows as that allows
WAITING = GIB  # at most, of all forwards of one sweep between two layers; more sweeps where that is too little


def measure(
    engine: Engine,
    text: str,
    *,
    prompt_tokens: int = 384,
    continue_tokens: int = 128,
    windows: int = 2,
    shares: Sequence[float] = SHARES,
    on_progress: OnLayer | None = None,
) -> Curves:
    """The curves of the engine's checkpoint, on windows spread evenly over a text.

    `shares` ascend from 0 to 1. on_progress(done, total) counts the layers of all sweeps. The engine is empty after it.
    Raises PromptError for too short a text, OptionError, BudgetError, NumericError, and what a sweep raises."""
    if any(len(layer.blocks) != 1 for layer in engine.skeleton.layers):
        raise OptionError(f"{engine.name} has layers with none or several feed-forward blocks: they cannot be measured")
    if min(prompt_tokens, continue_tokens, windows) < 1:
        raise OptionError("the prompt, the continuation and the number of windows are at least 1")
    pieces = cut_prompts(engine, text, windows, prompt_tokens + continue_tokens, "windows")
    layers = len(engine.skeleton.layers)
    rows = max(1, LOGITS // (continue_tokens * engine.sizes.vocabulary * engine.sizes.item))
    pruned = range(len(shares) - 1)  # all neurons: the full model itself
    tasks = [
        _Task(window, layer, tuple(pruned[first : first + rows]))
        for window in range(windows)
        for layer in range(layers)
        for first in range(0, len(pruned), rows)
    ]
    sweep = _Sweep(engine, pieces, prompt_tokens, shares)
    groups = sweep.groups(tasks)
    totals = [[0.0] * len(shares) for _ in range(layers)]
    for done, group in enumerate(groups):

        def on_layer(layer: int, count: int, before: int = done) -> None:
            if on_progress:
                on_progress(before * count + layer, len(groups) * count)

        for task, values in zip(group, sweep.run(group, on_layer), strict=True):
            for column, value in zip(task.columns, values, strict=True):
                totals[task.layer][column] += value / windows
    if not all(math.isfinite(value) for row in totals for value in row):
        raise NumericError(f"the output of {engine.name} is NaN or infinite in {engine.dtype}; try --dtype float32")
    return Curves(
        key=checkpoint_key(engine.checkpoint),
        shares=tuple(shares),
        kl=tuple(map(tuple, totals)),
        text_sha256=text_hash(text),
        prompt_tokens=prompt_tokens,
        continue_tokens=continue_tokens,
        windows=windows,
        dtype=engine.dtype,
    )


def calibrate(
    engine: Engine,
    text: str | None = None,
    *,
    prompt_tokens: int = 384,
    continue_tokens: int = 128,
    windows: int = 2,
    force: bool = False,
    on_progress: OnLayer | None = None,
) -> tuple[Path, Curves]:
    """The curves on a text (default: the package's own) and the file where runs find them: measured, or as they were
    measured before. Raises OptionError where the file holds other curves than asked for, unless `force`; else as
    `measure`."""
    text = TEXT.read_text() if text is None else text
    path = calibration_path(cache_folder(), checkpoint_key(engine.checkpoint))
    before = None if force else load_curves(path)
    if before is not None:
        asked = (text_hash(text), prompt_tokens, continue_tokens, windows, engine.dtype)
        there = (before.text_sha256, before.prompt_tokens, before.continue_tokens, before.windows, before.dtype)
        if asked != there:
            raise OptionError(
                f"{engine.name} has a calibration measured otherwise ({path}: {before.windows} windows of "
                f"{before.prompt_tokens} + {before.continue_tokens} tokens in {before.dtype}, text "
                f"{before.text_sha256[:8]}); --force replaces it"
            )
        return path, before
    curves = measure(
        engine,
        text,
        prompt_tokens=prompt_tokens,
        continue_tokens=continue_tokens,
        windows=windows,
        on_progress=on_progress,
    )
    save_curves(path, curves)
    return path, curves


def text_hash(text: str) -> str:
    """SHA-256 of a text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def divergence(truth: Tensor, logits: Tensor) -> list[float]:
    """KL of each row's distribution from the true one, mean over tokens, nats: logits (C, V) and (R, C, V) -> R."""
    totals = [0.0] * len(logits)
    for begin in range(0, len(truth), POSITIONS):
        part = slice(begin, begin + POSITIONS)
        theirs = truth[part].float().log_softmax(-1)
        weights = theirs.exp()
        for row, ours in enumerate(logits):
            totals[row] += (weights * (theirs - ours[part].float().log_softmax(-1))).sum().item()
    return [total / len(truth) for total in totals]


@dataclass(frozen=True)
class _Task:
    """One forward: a window's continuation, a row for each of `columns`: shares of one layer's neurons."""

    window: int
    layer: int
    columns: tuple[int, ...]


class _Sweep:
    """Tasks over one read of the weights, with what they need: each window's prompt and full model."""

    def __init__(self, engine: Engine, windows: Sequence[Sequence[int]], prompt_tokens: int, shares: Sequence[float]):
        self._engine, self._windows, self._shares = engine, windows, shares
        self._prompt_tokens, self._continue_tokens = prompt_tokens, len(windows[0]) - prompt_tokens

    def groups(self, tasks: Sequence[_Task]) -> list[list[_Task]]:
        """The tasks in as few sweeps as memory allows."""
        most = min(WAITING, self._engine.budget // 4)
        groups: list[list[_Task]] = [[]]
        for task in tasks:
            if groups[-1] and self.waiting([*groups[-1], task]) > most:
                groups.append([])
            groups[-1].append(task)
        return groups

    def run(self, tasks: Sequence[_Task], on_layer: OnLayer) -> list[list[float]]:
        """Each task's KL, row by row."""
        engine, layers = self._engine, self._engine.skeleton.layers
        numbers = sorted({task.window for task in tasks})
        prompts = {n: _Prompt(engine, self._windows[n][: self._prompt_tokens]) for n in numbers}
        fulls = {n: _Full(engine, prompts[n], self._windows[n][self._prompt_tokens :]) for n in numbers}
        pruned = [_Pruned(fulls[task.window], task.layer, [self._shares[c] for c in task.columns]) for task in tasks]
        jobs: list[_Prompt | _Full | _Pruned] = [*prompts.values(), *fulls.values(), *pruned]

        def watch(layer: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
            return jobs[passage.job].watch(layer, z, tokens, expert)

        with ExitStack() as stack:
            passage = stack.enter_context(engine.passage(len(self._windows[0]), self.waiting(tasks), on_layer))
            for index, layer in enumerate(layers):
                stack.callback(Tap(layer.module, layer.blocks[0].path, partial(watch, index)).remove)
            results = passage.run(jobs)
        return results[-len(tasks) :]

    def waiting(self, tasks: Sequence[_Task]) -> int:
        """Bytes that these forwards hold between two layers, and the largest one's activations and logits."""
        sizes, following = self._engine.sizes, self._continue_tokens
        rows = max(len(task.columns) for task in tasks)
        windows = len({task.window for task in tasks})
        tokens = windows * len(self._windows[0]) + sum(len(task.columns) for task in tasks) * following
        hidden = 3 * tokens * sizes.hidden * sizes.item
        prompts = windows * self._prompt_tokens * sum(sizes.cache_per_token)
        logits = (windows + rows) * following * sizes.vocabulary * sizes.item + 6 * POSITIONS * sizes.vocabulary * 4
        return hidden + prompts + logits + sizes.activations(rows * following)


class _Prompt:
    """The prompt by the full model: its keys and values, and the statistic of every layer."""

    def __init__(self, engine: Engine, ids: Sequence[int]) -> None:
        self.tokens, self.cache = len(ids), prompt_cache()
        self.statistics: dict[int, Tensor] = {}
        self._engine, self._ids = engine, ids

    def __call__(self) -> list[float]:
        ids = torch.tensor([self._ids], device=self._engine.device)
        self._engine.skeleton.model.base_model(ids, past_key_values=self.cache, use_cache=True)  # no logits are needed
        return []

    def watch(self, layer: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> None:
        if layer not in self.statistics:
            shape = self._engine.skeleton.layers[layer].blocks[0].statistic_shape
            self.statistics[layer] = torch.zeros(shape, dtype=torch.float32, device=z.device)
        total = self.statistics[layer] if expert is None else self.statistics[layer][expert]
        total += neuron_statistic(z)


class _Full:
    """The continuation by the full model: its logits (C, V), which all others are compared with."""

    def __init__(self, engine: Engine, prompt: _Prompt, ids: Sequence[int]) -> None:
        self.engine, self.prompt, self.ids = engine, prompt, ids
        self.logits = torch.empty(0)

    def __call__(self) -> list[float]:
        self.logits = self.forward(1)[0]
        return []

    def watch(self, layer: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> None:
        pass

    def forward(self, rows: int) -> Tensor:
        """Logits (R, C, V) of equal rows; what tells them apart is in `watch`."""
        skeleton = self.engine.skeleton
        ids = torch.tensor([self.ids], device=self.engine.device).expand(rows, -1)
        cache = branch(self.prompt.cache, self.prompt.tokens, len(skeleton.layers))
        logits: Tensor = skeleton.model(ids, past_key_values=cache, use_cache=True).logits
        return logits


class _Pruned:
    """The continuation with only the prompt's experts in one layer, a row for each of `shares`."""

    def __init__(self, full: _Full, layer: int, shares: Sequence[float]) -> None:
        self._full, self._layer, self._shares = full, layer, shares
        self._dropped: Tensor | None = None  # (R, F) or (R, E, F), bool

    def __call__(self) -> list[float]:
        logits = self._full.forward(len(self._shares))  # the full model's are there when this returns, not before
        return divergence(self._full.logits, logits)

    def watch(self, layer: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
        if layer != self._layer:
            return None
        if self._dropped is None:
            self._dropped = self._drop(self._full.prompt.statistics[layer])
        skeleton = self._full.engine.skeleton
        pieces = skeleton.pieces_of(skeleton.layers[layer], skeleton.layers[layer].blocks[0])
        begin = pieces.begin if pieces else 0
        places = begin + (torch.arange(z.shape[:-1].numel(), device=z.device) if tokens is None else tokens)
        rows = places // len(self._full.ids)  # of the batch: (n,), for n of the forward's N tokens
        dropped = self._dropped if expert is None else self._dropped[:, expert]
        return z.masked_fill(dropped[rows].view(z.shape), 0)

    def _drop(self, statistic: Tensor) -> Tensor:
        """Statistic (F,) or (E, F) -> what is no expert, for every row."""
        dropped = torch.ones((len(self._shares), *statistic.shape), dtype=torch.bool, device=statistic.device)
        for row, share in zip(dropped, self._shares, strict=True):
            row.scatter_(-1, select_experts(statistic, round(share * statistic.shape[-1])), False)
        return dropped
