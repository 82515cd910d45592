"""What a static choice of neurons is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError, PromptError
from ..options import SCORES, check
from .statistic import STATISTICS, Statistic


@dataclass(frozen=True)
class Calibration:
    """Token ids of each sample, the score to compute over them (one of options.SCORES), and the seed of 'random'.

    `facts`: where the samples come from (calibration_texts.Samples), for cards and reports. Raises OptionError,
    PromptError."""

    samples: Sequence[list[int]] = ()
    score: str = "griffin"
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.score, SCORES, "score")
        if self.statistic.sums and not self.samples:
            raise PromptError(f"score {self.score!r} is measured on samples of text: give at least one")
        if not self.statistic.sums and self.samples:
            raise OptionError(f"score {self.score!r} is the same whatever the samples are: leave them out")
        if not all(self.samples):
            raise PromptError("a calibration sample is empty: give at least one token of text")

    @property
    def statistic(self) -> Statistic:
        return STATISTICS[self.score]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; 1 without samples."""
        return max(map(len, self.samples), default=1)

    def to_json(self) -> dict[str, Any]:
        counts = {"samples": len(self.samples), "tokens": sum(map(len, self.samples))}
        return {"score": self.score, "seed": self.seed, **counts, **self.facts}
