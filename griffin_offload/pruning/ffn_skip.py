"""FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865): skips whole feed-forward blocks that hardly change the state.

Similarity of a block: the cosine between the hidden state before it and after it, the residual included. Blocks are
numbered over the layers that have one. T tokens, L blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import FfnSkip

WINDOW = 4  # tokens between corrections of the threshold
LEVELS = 128  # candidates for a threshold


@dataclass(frozen=True)
class SkippedBlocks:
    """What an answer skipped. `by_layer`: for each decoder layer, the share of tokens that skipped its block. `blocks`:
    count of layers with a block. `bytes` of resident weights that a token did not read, on average."""

    skip: FfnSkip
    by_layer: tuple[float, ...]
    blocks: int
    bytes: int = 0

    @property
    def share(self) -> float:
        """Share of all blocks of all tokens."""
        return sum(self.by_layer) / self.blocks

    def __str__(self) -> str:
        if self.skip.by_prompt:
            layers = " ".join(str(layer) for layer, share in enumerate(self.by_layer) if share)
            return f"{self.share:.1%} of {self.skip.share:.1%} asked; layers: {layers or 'none'}"
        percents = " ".join(f"{100 * share:.0f}" for share in self.by_layer)
        return f"{self.share:.1%} of {self.skip.share:.1%} asked; by layer, in %: {percents}"

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.skip.mode, "asked": self.skip.share, "reached": self.share, "by_layer": self.by_layer}


class Skipping:
    """Decides, block after block, which of T tokens skip it."""

    def __init__(self, skip: FfnSkip, blocks: int, tokens: int, device: str | torch.device = "cpu") -> None:
        self._skip, self._may = skip, skip.skippable(blocks)
        self._left = torch.zeros(tokens, dtype=torch.int64, device=device)  # blocks that each token still skips
        self._most = skip.length(blocks)

    def skips(self, block: int) -> Tensor:
        """The tokens that skip this block: (T,), bool."""
        if block not in self._may:
            return torch.zeros_like(self._left, dtype=torch.bool)
        return self._left > 0

    def update(self, block: int, skipped: Tensor, similarity: Tensor, threshold: float | Tensor) -> None:
        """After a block: `skipped` (T,), similarity (T,) (ignored where skipped), one threshold or (T,)."""
        more = torch.where(similarity >= threshold, self._most, 0)
        self._left = torch.where(skipped, self._left - 1, more)


def skipped_share(similarity: Tensor, skip: FfnSkip, thresholds: Tensor) -> Tensor:
    """Similarity (T, L) of tokens that skipped nothing, thresholds (K,) -> the share of all blocks that each would have
    skipped (K,)."""
    tokens, blocks = similarity.shape
    count = len(thresholds)
    state = Skipping(skip, blocks, count * tokens, similarity.device)
    thresholds = thresholds.repeat_interleave(tokens)
    total = torch.zeros(count, dtype=torch.int64, device=similarity.device)
    for block in range(blocks):
        skipped = state.skips(block)
        state.update(block, skipped, similarity[:, block].repeat(count), thresholds)
        total += skipped.view(count, tokens).sum(1)
    return total / (tokens * blocks)


class Thresholds:
    """Thresholds for a prompt, from its similarity (T, L), float32, measured without skipping."""

    def __init__(self, similarity: Tensor, skip: FfnSkip) -> None:
        levels = similarity.flatten().unique()  # ascending: a higher one skips less
        self._levels = levels[torch.linspace(0, len(levels) - 1, min(len(levels), LEVELS)).long()]
        self._shares = skipped_share(similarity, skip, self._levels)

    def of(self, share: float) -> float:
        """The lowest threshold that would have skipped at most this share of all blocks.

        Infinite for share 0 or if every threshold skips more; -infinite if even the lowest skips no more."""
        enough = (self._shares <= share).nonzero()
        if not len(enough) or share <= 0:
            return float("inf")
        first = int(enough[0])
        return float(self._levels[first]) if first else float("-inf")


def next_to_leave(held: Sequence[int], gone: Sequence[int], similarity: Tensor, skip: FfnSkip) -> int:
    """The block among `held` that the prompt needs least: the highest similarity (L,), the mean over its tokens.

    Blocks that would make a run of skipped ones longer than allowed come last; of equals the first is taken."""
    run = skip.length(len(similarity))
    return max(held, key=lambda block: (_neighbours(block, gone) <= run, float(similarity[block]), -block))


def most_saturated(similarity: Tensor, skip: FfnSkip) -> list[int]:
    """The blocks that a prompt's answer skips, ascending: similarity (L,), the mean over its tokens.

    Chosen as the layers pass: once as many blocks are held as may stay, each further one replaces another or itself
    (`next_to_leave`)."""
    may = skip.skippable(len(similarity))
    room = len(may) - skip.count(len(similarity))
    held: list[int] = []
    gone: list[int] = []
    for block in may:
        held.append(block)
        if len(held) > room:
            gone.append(next_to_leave(held, gone, similarity, skip))
            held.remove(gone[-1])
    return sorted(gone)


def _neighbours(block: int, gone: Sequence[int]) -> int:
    """Length of the run of skipped blocks, if this one is skipped too."""
    first = last = block
    while first - 1 in gone:
        first -= 1
    while last + 1 in gone:
        last += 1
    return last - first + 1
