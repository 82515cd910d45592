"""The ways of pruning that a measurement compares."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ...engine import Engine
from ...errors import OptionError
from ...options import AUTO, DRAWN, OFF, RESIDENT_DTYPES, WITHOUT_STATISTIC, FfnSkip, Pruning, default_of
from ...paths import expand
from ...planning.ladder import REST
from ...planning.plan import DEFAULT_SPARSITY, Plan, make_plan
from ...planning.sizes import Kept
from ...pruning.prior import load_prior
from ...pruning.selection import Selection
from ...quant.precision import Precision, precision


@dataclass(frozen=True)
class ScoredRow:
    """One way of pruning as a row of a batch: neurons that are not kept are zeroed there.

    `kept`: neurons by layer and block, chosen by `selection`; None: all. `skip`: blocks to skip besides, or what
    `ablation` puts in their place (skipped.ABLATIONS). `static`: the context too passes through the pruned model, whose
    neurons no context chooses, as in an exported model. `fold`: strength of the fold; None: there is none."""

    selection: Selection = field(default_factory=Selection)
    kept: Kept | None = None
    skip: FfnSkip | None = None
    ablation: str = ""
    static: bool = False
    fold: float | None = None


@dataclass(frozen=True)
class Variant(Pruning):
    """One way of pruning to measure: a Pruning with nothing left to the memory of a machine, and what no answer can be
    asked for. By default sparsity 0.5, bfloat16, and the rest in int4, as an answer keeps it where that fits; dropped
    where no answer could keep it. What is dropped is folded, and chosen with the model's prior, as in an answer, where
    it can be scored so. Every layer drops the same share unless a calibration is asked for.

    Sparsity 0 is the full model, whatever the selection. `seed`: of a selection that draws. `ablation`, `static`: see
    ScoredRow. Raises OptionError for a value out of range or an unknown name."""

    seed: int = 0
    ablation: str = ""
    static: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {"sparsity": DEFAULT_SPARSITY, "resident_dtype": RESIDENT_DTYPES[0]}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.allocation == AUTO:
            object.__setattr__(self, "allocation", "uniform")
        if self.rest is None:
            drops = (self.skip.share and self.skip.by_prompt) or self.ablation or self.static
            object.__setattr__(self, "rest", REST if any(self.shares) and not drops else "drop")
        if self.rest != "drop" or not any(self.shares):
            object.__setattr__(self, "fold", False)
        elif self.fold is None:
            object.__setattr__(self, "fold", not (self.skip.share or self.ablation or self.static))
        if self.prior == AUTO and (self.rest != "drop" or not self.chosen_with_prior):
            object.__setattr__(self, "prior", OFF)
        if not self.fold:
            object.__setattr__(self, "fold_strength", default_of(Pruning, "fold_strength"))
        self.precision  # noqa: B018 - 'auto' is refused here

    @property
    def full(self) -> bool:
        return not any(self.shares) and self.resident_dtype == RESIDENT_DTYPES[0] and not self.skip.share

    @property
    def quantized(self) -> bool:
        return self.precision.quantized and not self.full

    @property
    def precision(self) -> Precision:
        return precision(str(self.resident_dtype), str(self.rest))

    @property
    def chosen_with_prior(self) -> bool:
        """Whether the model's own prior would have a say in what is kept, as in an answer."""
        return any(self.shares) and not (self.ablation or self.static or self.selection in WITHOUT_STATISTIC)

    @property
    def shares(self) -> tuple[float, ...]:
        """The sparsity of every layer, or the one of all."""
        assert self.sparsity is not None
        return (self.sparsity,) if isinstance(self.sparsity, int | float) else tuple(self.sparsity)

    def label(self) -> str:
        """Short and for people: 'full', '50%' (the rest is dropped), '50% random seed 1 int4, rest int4'."""
        if self.full:
            return "full"
        words = [f"{100 * sum(self.shares) / len(self.shares):.4g}%"]
        words += ["by layer"] if not isinstance(self.sparsity, int | float) else []
        words += [self.selection] if self.selection != "topk" else []
        words += [f"seed {self.seed}"] if self.seed and self.selection in DRAWN else []
        words += [self.allocation] if self.allocation != "uniform" else []
        words += [str(self.resident_dtype)] if self.resident_dtype != RESIDENT_DTYPES[0] else []
        if self.prior != OFF:
            words += ["prior"] if self.prior_weight is None else [f"prior {self.prior_weight:g}"]
        words += [f"fold {self.folds:g}"] if self.folds else []
        words += [f"skip {self.skip.share:.4g} by {self.skip.mode}"] if self.skip.share else []
        return " ".join(words) + (f", rest {self.rest}" if self.rest != "drop" and any(self.shares) else "")

    def facts(self, *names: str) -> dict[str, Any]:
        """Those of its options, by name: for rows and results."""
        return {name: getattr(self, name) for name in names}

    def plan(self, engine: Engine, prompt_tokens: int, max_new_tokens: int) -> Plan:
        """The plan of such a run, whether or not it fits. Raises OptionError for 'sensitivity' without a calibration:
        an answer may use 'uniform' instead, but a measurement would then have the wrong name."""
        if self.allocation == "sensitivity" and not self.full and engine.opened.curves() is None:
            raise OptionError(
                f"{engine.name} is not calibrated: run `griffin calibrate` once, or leave out allocation 'sensitivity'"
            )
        request = replace(
            engine.opened.request(prompt_tokens, max_new_tokens),
            sparsity=self.sparsity or 0.0,
            curves=engine.opened.allocation_curves(self),
            precision=self.precision,
            fold=self.folds,
            skip=self.skip if self.skip.share else None,
        )
        return make_plan(engine.sizes, request)

    def row(self, engine: Engine) -> ScoredRow:
        """The variant as a row of a batch, which quantizes nothing. Raises OptionError as `plan`."""
        plan = replace(self, skip=FfnSkip()).plan(engine, 1, 1)
        skip = self.skip if self.skip.share else None
        selection = engine.opened.selection(self, self.seed, plan)
        return ScoredRow(selection, plan.kept, skip, self.ablation, self.static, self.folds)

    @property
    def drawn_by(self) -> int | None:
        """The seed where the selection draws by it; elsewhere it would only draw tokens."""
        return self.seed if self.selection in DRAWN else None


FULL = Variant(0.0)


def all_variants(
    sparsities: Sequence[float],
    selections: Sequence[str],
    allocations: Sequence[str],
    seed: int = 0,
    resident_dtypes: Sequence[str] = RESIDENT_DTYPES[:1],
    rests: Sequence[str | None] = (None,),
    folds: Sequence[float | None] = (None,),
    method: str | None = None,
) -> list[Variant]:
    """Every combination, in this order. `folds`: strengths of the fold; 0: none; None: as answers have it. At sparsity
    0 there is nothing to select, to share or to drop: it stands once for each resident dtype."""
    found = [
        Variant(sparsity, dtype, rest, selection, allocation, method=method, seed=seed, **_fold(strength))
        if sparsity
        else Variant(0.0, resident_dtype=dtype)
        for sparsity, selection, allocation, dtype, rest, strength in product(
            sparsities, selections, allocations, resident_dtypes, rests or (None,), folds or (None,)
        )
    ]
    return list(dict.fromkeys(found))


def _fold(strength: float | None) -> dict[str, Any]:
    if strength is None:
        return {}
    return {"fold": True, "fold_strength": strength} if strength else {"fold": False}


def with_prior(
    engine: Engine, variants: Sequence[Variant], source: str | Path, weights: Sequence[float | None] = ()
) -> list[Variant]:
    """The same variants with a prior (a file's; 'auto', the model's own; or 'off'), at each of the weights (none: by
    the prompt's length); the full model once.

    Raises GriffinError for a file that is no prior, OptionError for the prior of another model."""
    prior: Any = source
    if source not in (AUTO, OFF):
        prior = load_prior(expand(source))
        engine.opened.check_prior(prior)
    found = [
        variant if variant.full else replace(variant, prior=prior, prior_weight=weight)
        for variant, weight in product(variants, weights or (None,))
    ]
    return list(dict.fromkeys(found))
