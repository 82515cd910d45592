"""FFN-SkipLLM (Jaiswal et al. 2024, arXiv:2404.03865): whole feed-forward blocks are left out where they saturate.

A block's similarity: the cosine between the hidden state that enters it and the one that leaves it, the residual added.
Blocks are counted over the layers that have one; the first and last of them are cold: they always run.
T tokens, L blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import FfnSkip

WINDOW = 4  # tokens after which the threshold is corrected
LEVELS = 128  # of similarity, that a threshold is chosen from


@dataclass(frozen=True)
class SkippedBlocks:
    """What an answer left out. `by_layer`: by decoder layer, the share of the answer's tokens that skipped its block;
    `blocks`: how many layers have one; `bytes`: of resident weights, that a token on average did not read for it."""

    skip: FfnSkip
    by_layer: tuple[float, ...]
    blocks: int
    bytes: int = 0

    @property
    def share(self) -> float:
        """Of all blocks of all tokens."""
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
    """Which tokens are at which block of their way through the blocks, one block after the other."""

    def __init__(self, skip: FfnSkip, blocks: int, tokens: int, device: str | torch.device = "cpu") -> None:
        self._skip, self._may = skip, skip.skippable(blocks)
        self._left = torch.zeros(tokens, dtype=torch.int64, device=device)  # blocks that a token is yet to skip
        self._most = skip.length(blocks)

    def skips(self, block: int) -> Tensor:
        """(T,), bool: the tokens that leave this block out."""
        if block not in self._may:
            return torch.zeros_like(self._left, dtype=torch.bool)
        return self._left > 0

    def update(self, block: int, skipped: Tensor, similarity: Tensor, threshold: float | Tensor) -> None:
        """After a block: similarity (T,), which of a token that skipped it says nothing; one threshold, or (T,)."""
        more = torch.where(similarity >= threshold, self._most, 0)
        self._left = torch.where(skipped, self._left - 1, more)


def skipped_share(similarity: Tensor, skip: FfnSkip, thresholds: Tensor) -> Tensor:
    """The share of all blocks that each threshold (K,) would have skipped, (K,): similarity (T, L), of tokens that
    skipped none."""
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
    """What similarity skips which share, on a prompt: similarity (T, L), float32, of tokens that skipped none."""

    def __init__(self, similarity: Tensor, skip: FfnSkip) -> None:
        levels = similarity.flatten().unique()  # ascending: the higher, the fewer are skipped
        self._levels = levels[torch.linspace(0, len(levels) - 1, min(len(levels), LEVELS)).long()]
        self._shares = skipped_share(similarity, skip, self._levels)

    def of(self, share: float) -> float:
        """The lowest similarity at which no more than a share of all blocks would have been skipped.

        Infinite where none skips so little, or nothing shall be skipped; -infinite where all that may be skipped is no
        more."""
        enough = (self._shares <= share).nonzero()
        if not len(enough) or share <= 0:
            return float("inf")
        first = int(enough[0])
        return float(self._levels[first]) if first else float("-inf")


def next_to_leave(held: Sequence[int], gone: Sequence[int], similarity: Tensor, skip: FfnSkip) -> int:
    """Of the blocks held, which may be skipped, the one that a prompt can best do without: similarity (L,), its tokens'
    mean as far as it is known.

    One that would leave with more than `run` neighbours in a row only if there is no other; of equals the first one."""
    run = skip.length(len(similarity))
    return max(held, key=lambda block: (_neighbours(block, gone) <= run, float(similarity[block]), -block))


def most_saturated(similarity: Tensor, skip: FfnSkip) -> list[int]:
    """The blocks that a prompt leaves out, ascending: similarity (L,), its tokens' mean.

    Chosen as the layers pass: there is room for those that stay, and from when it is full, each further block makes one
    leave (see `next_to_leave`), itself or one before it."""
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
    """How many blocks in a row would be gone, with this one."""
    first = last = block
    while first - 1 in gone:
        first -= 1
    while last + 1 in gone:
        last += 1
    return last - first + 1
