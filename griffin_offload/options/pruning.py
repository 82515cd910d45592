"""What is kept of a model for an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from .declare import number, option, parse_shares, switch
from .ffn_skip import FfnSkip
from .group import Checked, default_of
from .names import ALLOCATIONS, AUTO, METHODS, OFF, RESIDENT_DTYPES, RESTS, SELECTIONS

Sparsity = float | Sequence[float]  # of every layer, or one for each


@dataclass(frozen=True)
class Pruning(Checked):
    """What is kept of the model for one answer. Where sparsity, resident_dtype and rest are None, the best that fits is
    taken (planning/ladder.py). A method sets the fields that METHODS names; OptionError for one that says otherwise."""

    sparsity: Sparsity | None = option(
        None,
        "Share of the feed-forward neurons that are not kept as they are (--rest says what becomes of them), 0 to 1; "
        "or one for each layer: 0.2,0.5,... or a file of them; or auto.",
        parse=parse_shares,
        wanted="a number",
        metavar="SHARE",
        low=0,
        high=1,
        allowed="0 (nothing is pruned) to 1 (no neuron is kept)",
        default="auto, as little as fits",
    )
    resident_dtype: str | None = option(
        None,
        "Format of the weights kept in memory. bfloat16: as the model runs; int8, int4: quantized after the prompt has "
        "passed, lm_head in int8 in both. auto: the best that fits.",
        choices=(AUTO, *RESIDENT_DTYPES),
        default="auto, but bfloat16 where --sparsity is given",
    )
    rest: str | None = option(
        None,
        "The neurons that the prompt does not choose: int8, int4: kept in so many bits; drop: left out, as in the "
        "GRIFFIN paper, which saves more memory and costs far more quality; auto: int4 where it fits, else dropped.",
        choices=(AUTO, *RESTS),
        default=AUTO,
    )
    selection: str = option(
        "topk", "How the kept neurons are chosen. All but topk are for comparison.", choices=SELECTIONS
    )
    allocation: str = option(
        AUTO,
        "How the sparsity is shared over the layers. uniform: every layer drops the same share; sensitivity: as "
        "`griffin calibrate` measured it; auto: so, where it has, and in no export, whose layers have one width.",
        choices=ALLOCATIONS,
    )
    prior: Any = option(
        AUTO,
        "Scores of the neurons over other texts, mixed with the prompt's. auto: where neurons are dropped, of a text "
        "that ships with Griffin, measured once for each model; off: none; or a file that "
        "`griffin export-pruned --calibration ... --prior-out FILE` wrote.",
        metavar="FILE",
        default=AUTO,
    )
    prior_weight: float | None = number(
        None,
        "How much the prior counts, 0 (the prompt alone) to 1 (the prior alone).",
        metavar="W",
        low=0,
        high=1,
        allowed="0 (the prompt's own choice) to 1 (the prior's)",
        default="less, the longer the prompt is: as much as 64 tokens of it",
    )
    fold: bool | None = switch(
        "Where neurons are dropped, the kept ones take over what those gave the prompt, by ridge regression.",
        value=None,
        default="on",
    )
    fold_strength: float = number(
        0.3,
        "How strongly the fold holds on to the weights as they were: the ridge, in units of the mean squared "
        "activation.",
        metavar="L",
        above=0,
        allowed="above 0",
    )
    skip: FfnSkip = option(FfnSkip(), "Blocks to skip.", prefix="ffn_skip")
    method: str | None = option(
        None,
        "griffin: exactly the paper's choice, the neurons of the largest statistic, the same share in every layer, the "
        "rest dropped and nothing folded. It stands for --selection topk --allocation uniform --rest drop --no-fold "
        "--prior off.",
        choices=tuple(METHODS),
        default="none of these",
    )

    @property
    def folds(self) -> float | None:
        """The fold's strength; None: it is off."""
        return None if self.fold is False else self.fold_strength

    def __post_init__(self) -> None:
        if self.prior is None:
            object.__setattr__(self, "prior", OFF)
        for name, value in METHODS.get(self.method or "", {}).items():
            given = getattr(self, name)
            if given not in (value, AUTO, default_of(Pruning, name)):
                told = "off" if value is False else value or "none"
                raise OptionError(f"method {self.method} has {name} {told}: leave out {name}, or the method")
            object.__setattr__(self, name, value)
        if isinstance(self.sparsity, list):
            object.__setattr__(self, "sparsity", tuple(self.sparsity))
        if self.skip is None:
            object.__setattr__(self, "skip", FfnSkip())
        super().__post_init__()
