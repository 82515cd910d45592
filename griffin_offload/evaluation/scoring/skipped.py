"""Blocks that a continuation leaves out, as FFN-SkipLLM does (see skip.py), and what it is compared with.

What a prompt shows is seen in a reading of its own, since the rule needs all of its layers before the first token.
P prompt tokens, T tokens of the continuation, R rows of a batch, L blocks."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import OptionError
from ...model.hooks import Residual
from ...offload.lockstep import Lockstep, forwards
from ...options import FfnSkip, OnLayer
from ...pruning.ffn_skip import Skipping, Thresholds, most_saturated

INSTEAD = ("", "random", "layers")  # of the rule's blocks: as many drawn by lot; the whole layers, attention too


def similarities(
    engine: Engine, contexts: Sequence[Sequence[int]], waiting: int, on_layer: OnLayer | None = None
) -> list[Tensor]:
    """Of each block of the full model at each token of each context: (P, L), float32, by one read of the weights.

    `waiting`: bytes that the forwards hold between two layers."""
    found: list[list[Tensor]] = [[] for _ in contexts]
    with ExitStack() as stack:
        passage: Lockstep = stack.enter_context(engine.passage(max(map(len, contexts)), waiting, on_layer))
        for layer in engine.skeleton.layout.block_layers:
            module = engine.skeleton.modules[layer]
            residual = Residual(module)
            stack.callback(residual.remove)

            def see(_: Any, args: Any, output: Any, residual: Residual = residual) -> None:
                leaving = output[0] if isinstance(output, tuple) else output
                found[passage.job].append(residual.similarity(leaving))

            stack.callback(module.register_forward_hook(see).remove)
        passage.run(forwards(engine.skeleton, [list(context) for context in contexts], engine.device))
    return [torch.stack(columns, dim=1) for columns in found]


class Skipped:
    """Which tokens of a continuation leave out the block at hand, by row; `warmup` of them do not.

    `skips`: of each row, and what instead of its rule (see INSTEAD); `similarity`: the prompt's (P, L)."""

    def __init__(
        self, skips: Sequence[tuple[FfnSkip | None, str]], tokens: int, similarity: Tensor, seed: int = 0
    ) -> None:
        self._rows = [_Row(skip, instead, tokens, similarity, seed) if skip else None for skip, instead in skips]
        self._tokens, self._device = tokens, similarity.device
        self._now = torch.empty(0)

    def at(self, block: int) -> Tensor:
        """(R, T), bool."""
        none = torch.zeros(self._tokens, dtype=torch.bool, device=self._device)
        self._now = torch.stack([row.at(block) if row else none for row in self._rows])
        return self._now

    def update(self, block: int, similarity: Tensor) -> None:
        """After a block: similarity (R T,)."""
        for row, skipped, seen in zip(self._rows, self._now, similarity.view(len(self._rows), -1), strict=True):
            if row:
                row.update(block, skipped, seen)

    @property
    def whole_layers(self) -> Tensor:
        """(R, T), bool: where the layer at hand is left out with its attention."""
        whole = [row is not None and row.instead == "layers" for row in self._rows]
        return self._now & torch.tensor(whole, device=self._device)[:, None]


class _Row:
    def __init__(self, skip: FfnSkip, instead: str, tokens: int, similarity: Tensor, seed: int) -> None:
        if instead not in INSTEAD:
            raise OptionError(f"what is skipped instead is one of {INSTEAD}, not {instead!r}")
        blocks = similarity.shape[1]
        self.instead = instead
        self._may_skip = torch.arange(tokens, device=similarity.device) >= (skip.warmup if skip.mode == "token" else 0)
        self._state = Skipping(skip, blocks, tokens, similarity.device)
        self._table: Tensor | None = None  # (T, L), bool, where it is known from the start
        if instead == "random":
            generator = torch.Generator().manual_seed(seed)
            may = torch.tensor(list(skip.skippable(blocks)), dtype=torch.int64)
            drawn = torch.rand(tokens, len(may), generator=generator).argsort(1)[:, : skip.count(blocks)]
            self._table = torch.zeros(tokens, blocks, dtype=torch.bool).scatter_(1, may[drawn], True)
        elif skip.mode == "prompt":
            self._table = torch.zeros(tokens, blocks, dtype=torch.bool)
            self._table[:, most_saturated(similarity.mean(0), skip)] = True
        else:
            self._threshold = Thresholds(similarity, skip).of(skip.share)

    def at(self, block: int) -> Tensor:
        skips = self._state.skips(block) if self._table is None else self._table[:, block].to(self._may_skip.device)
        return skips & self._may_skip

    def update(self, block: int, skipped: Tensor, similarity: Tensor) -> None:
        if self._table is None:
            self._state.update(block, skipped, similarity, self._threshold)
