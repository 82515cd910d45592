"""What a benchmark is asked to measure: lengths, methods, and the ways of pruning of Griffin's rows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ...errors import OptionError
from ...options import AUTO, FfnSkip, Pruning, check

METHODS = ("full", "accelerate", "magnitude", "griffin", "lossless", "llama-cpp")
WITH_TEXT = ("lossless",)  # methods whose speed depends on what the text says


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt, and of the answer."""

    prompt: int
    answer: int

    def __str__(self) -> str:
        return f"{self.prompt}+{self.answer}"


def parse_lengths(text: str) -> list[Lengths]:
    """'512+128,2048+256' -> lengths. Raises OptionError; an answer has at least 2 tokens, or it has no speed."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})\s*\+\s*(\d{1,7})\s*", part)
        if not match or int(match[1]) < 1 or int(match[2]) < 2:
            raise OptionError(
                f"lengths {part.strip()!r} are not PROMPT+ANSWER tokens, at least 1+2: write 512+128,2048+256"
            )
        found.append(Lengths(int(match[1]), int(match[2])))
    return list(dict.fromkeys(found))


def parse_methods(text: str | None, ggufs: Sequence[Path]) -> list[str]:
    """'full,griffin' -> names; None: all that can run. Raises OptionError."""
    if text is None:
        return [name for name in METHODS if name not in WITH_TEXT and (name != "llama-cpp" or ggufs)]
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        check(name, METHODS, "method")
    if "llama-cpp" in names and not ggufs:
        raise OptionError("method 'llama-cpp' reads a GGUF file of the same weights: give --llama-cpp FILE.gguf")
    return names if "llama-cpp" in names or not ggufs else [*names, "llama-cpp"]


@dataclass(frozen=True)
class Asked:
    """What to measure. `folder`: the checkpoint; `budget`: bytes, for every method; `cold`: drop the page cache before
    each run, None: where root allows it. `ram`: bytes of RAM for weights beside the device, None: what is free on a
    GPU, none on the CPU. `stop_after`: seconds after which no run begins or goes on.

    `sparsities`, `resident_dtypes`, `ffn_skips` (shares of skipped blocks, beside none): of Griffin's rows, a row for
    each combination, with the first of `rests`; then, of the first row, one for each of the other `rests`, one without
    options (`auto`) and one with compiled layers (`compiles`). `ggufs`: files of the same weights for llama.cpp, a row
    each. `prompt`: token ids that all answer; none: random ones. Raises OptionError."""

    name: str
    folder: Path
    budget: int
    lengths: Sequence[Lengths]
    methods: Sequence[str]
    sparsities: Sequence[float]
    repeats: int = 3
    max_seconds: float = 120.0
    dtype: str | None = None
    threads: int | None = None
    resident_dtypes: Sequence[str] = ("bfloat16",)
    ffn_skips: Sequence[float] = ()
    ffn_skip_mode: str = "token"
    ggufs: Sequence[Path] = ()
    capped: bool = True
    cold: bool | None = None
    device: str = "cpu"
    ram: int | None = None
    rests: Sequence[str] = (AUTO,)
    auto: bool = False
    compiles: bool = False
    stop_after: float | None = None
    prompt: Sequence[int] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def __post_init__(self) -> None:
        for share in self.ffn_skips:
            if not 0 < share <= 1:
                raise OptionError(f"ffn_skip {share:g} is outside its range: above 0, up to 1")
        self.prunings  # noqa: B018 - the other options are checked there

    @property
    def prunings(self) -> list[Pruning]:
        """Those of Griffin's rows."""
        skips = [FfnSkip(share, self.ffn_skip_mode) for share in (0.0, *self.ffn_skips)]
        rest, *others = self.rests
        combined = product(self.sparsities, self.resident_dtypes, skips)
        return [
            *(Pruning(sparsity, dtype, rest, skip=skip) for sparsity, dtype, skip in combined),
            *(Pruning(self.sparsities[0], self.resident_dtypes[0], other) for other in others),
            *([Pruning()] if self.auto else []),
        ]
