"""Which feed-forward blocks are skipped."""

from dataclasses import dataclass

from .declare import number, option, parse_pair, whole
from .group import Checked


@dataclass(frozen=True)
class FfnSkip(Checked):
    """FFN-SkipLLM (arXiv:2404.03865): whole feed-forward blocks are skipped where they change the hidden state least.

    `cold` (first, last): blocks at each end that are never skipped. Caps the reachable share at
    (L - first - last) / L of L blocks."""

    share: float = number(
        0.0,
        "Share of the feed-forward blocks to skip, those that change the hidden state least (FFN-SkipLLM).",
        metavar="SHARE",
        low=0,
        high=1,
        allowed="0 (no block is skipped) to 1 (all but the cold ones)",
        default="0",
    )
    mode: str = option(
        "token",
        "token: each token of the answer skips for itself, which saves time but no memory; prompt: the blocks that the "
        "prompt needs least keep no neurons, which saves both.",
        choices=("token", "prompt"),
    )
    cold: tuple[int, int] = option(
        (2, 2),
        "Blocks at each end that are never skipped.",
        parse=parse_pair,
        wanted="FIRST,LAST",
        metavar="FIRST,LAST",
        low=0,
        allowed="two numbers, 0 or more",
        default="2,2",
    )
    warmup: int = whole(
        4, "In token mode: the first N tokens of the answer skip nothing.", low=0, allowed="0 or more", default="4"
    )
    run: int = whole(
        0,
        "Skip at most N consecutive blocks.",
        low=0,
        allowed="0 (as few as reach the share) or more",
        default="0, as few as reach the share",
    )

    @property
    def by_prompt(self) -> bool:
        return self.mode == "prompt"

    def skippable(self, blocks: int) -> range:
        """Those of L blocks that may be skipped: all but the cold ends. In token mode never the first, since nothing
        before it tells how much it would change."""
        first = max(self.cold[0], 1 if self.mode == "token" else 0)
        return range(first, max(first, blocks - self.cold[1]))

    def count(self, blocks: int) -> int:
        """Blocks that a prompt's answer leaves out: the share, as far as the cold ends allow."""
        return min(round(self.share * blocks), len(self.skippable(blocks)))

    def length(self, blocks: int) -> int:
        """Longest run of consecutive skips. One of every run + 1 skippable blocks still runs; 0 picks the shortest run
        that reaches the share."""
        skippable, wanted = len(self.skippable(blocks)), self.count(blocks)
        runs = range(1, skippable + 2)
        return self.run or next(run for run in runs if skippable - skippable // (run + 1) >= wanted)
