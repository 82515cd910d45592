"""Which blocks a continuation skips, as FFN-SkipLLM does (see ffn_skip.py), and the ablations it is compared with.

The rule needs all layers of the prompt before the first token: the prompt is read once more for it, beforehand.
P prompt tokens, T tokens of the continuation, R rows of a batch, L blocks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import OptionError
from ...model.hooks import Residual
from ...model.skeleton import Skeleton
from ...offload.layer_hook import LayerHook
from ...offload.lockstep import forwards
from ...options import FfnSkip, OnLayer
from ...pruning.ffn_skip import Skipping, Thresholds, most_saturated

# In the place of the rule: as many blocks drawn at random; or the rule's, but whole layers, attention too.
ABLATIONS = ("", "random", "layers")


def similarities(
    engine: Engine, contexts: Sequence[Sequence[int]], waiting: int, on_layer: OnLayer | None = None
) -> list[Tensor]:
    """Similarity of each block of the full model, at each token of each context: (P, L), float32, by one reading.

    `waiting`: bytes that the forwards hold between two layers."""
    hooks = [_Similarities(engine.skeleton) for _ in contexts]
    with engine.passage(max(map(len, contexts)), waiting, on_layer, hooks) as lockstep:
        lockstep.run(forwards(engine.skeleton, [list(context) for context in contexts], engine.device))
    return [torch.stack(hook.found, dim=1) for hook in hooks]


class _Similarities(LayerHook):
    """The similarity (P,) of each block that a forward has passed."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.found: list[Tensor] = []
        self._skeleton = skeleton
        self._residual: Residual | None = None

    def before(self, layer: int, states: Tensor | None) -> None:
        if self._skeleton.layers[layer].blocks:
            self._residual = Residual(self._skeleton.modules[layer])

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        if self._residual and states is not None:
            self.found.append(self._residual.similarity(states))
        self.close()

    def close(self) -> None:
        if self._residual:
            self._residual.remove()
        self._residual = None


class ContinuationSkips:
    """Which tokens of a continuation skip which blocks, row by row, one block after the other."""

    def __init__(
        self, skips: Sequence[tuple[FfnSkip | None, str]], tokens: int, similarity: Tensor, seed: int = 0
    ) -> None:
        """`skips`: each row's, and its ablation; `similarity`: the prompt's (P, L)."""
        self._rows = [_RowSkips(skip, each, tokens, similarity, seed) if skip else None for skip, each in skips]
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
        """(R, T), bool: the tokens that skip the layer at hand with its attention."""
        whole = [row is not None and row.ablation == "layers" for row in self._rows]
        return self._now & torch.tensor(whole, device=self._device)[:, None]


class _RowSkips:
    def __init__(self, skip: FfnSkip, ablation: str, tokens: int, similarity: Tensor, seed: int) -> None:
        if ablation not in ABLATIONS:
            raise OptionError(f"ablation {ablation!r} is not known; known: {', '.join(map(repr, ABLATIONS))}")
        blocks = similarity.shape[1]
        self.ablation = ablation
        self._warm = torch.arange(tokens, device=similarity.device) >= (skip.warmup if skip.mode == "token" else 0)
        self._state = Skipping(skip, blocks, tokens, similarity.device)
        self._table: Tensor | None = None  # (T, L), bool, where it is known from the start
        if ablation == "random":
            generator = torch.Generator().manual_seed(seed)
            skippable = torch.tensor(list(skip.skippable(blocks)), dtype=torch.int64)
            drawn = torch.rand(tokens, len(skippable), generator=generator).argsort(1)[:, : skip.count(blocks)]
            self._table = torch.zeros(tokens, blocks, dtype=torch.bool).scatter_(1, skippable[drawn], True)
        elif skip.mode == "prompt":
            self._table = torch.zeros(tokens, blocks, dtype=torch.bool)
            self._table[:, most_saturated(similarity.mean(0), skip)] = True
        else:
            self._threshold = Thresholds(similarity, skip).of(skip.share)

    def at(self, block: int) -> Tensor:
        skips = self._state.skips(block) if self._table is None else self._table[:, block].to(self._warm.device)
        return skips & self._warm

    def update(self, block: int, skipped: Tensor, similarity: Tensor) -> None:
        if self._table is None:
            self._state.update(block, skipped, similarity, self._threshold)
