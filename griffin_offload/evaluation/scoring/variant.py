"""The ways of pruning that a measurement compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ...engine import Engine
from ...errors import OptionError
from ...options import FfnSkip
from ...planning.plan import Plan, make_plan
from ...pruning.prior import WEIGHT, Prior, load_prior
from ...pruning.selection import Selection, check_sparsity
from ...quant.precision import precision
from .passage import Row


@dataclass(frozen=True)
class Variant:
    """One way of pruning and packing. `sparsity`: of every layer, or of each; 0 is the full model, whatever the
    selection says. `resident_dtype`, `rest`: see precision.precision. `prior`, `prior_weight`: see selection.Selection;
    `skip`, `instead`, `static`: see passage.Row.

    Raises OptionError for a sparsity out of range or an unknown name."""

    sparsity: float | tuple[float, ...] = 0.5
    selection: str = "topk"
    allocation: str = "uniform"
    seed: int = 0
    resident_dtype: str = "bfloat16"
    rest: str = "drop"
    prior: Prior | None = None
    prior_weight: float = WEIGHT
    skip: FfnSkip | None = None
    instead: str = ""
    static: bool = False

    def __post_init__(self) -> None:
        for share in self._layers:
            check_sparsity(share)
        self.chosen  # noqa: B018 - a name or a weight that is wrong is refused here
        precision(self.resident_dtype, self.rest)

    @property
    def full(self) -> bool:
        return not any(self._layers) and self.resident_dtype == "bfloat16" and self.skip is None

    @property
    def quantized(self) -> bool:
        return precision(self.resident_dtype, self.rest).quantized and not self.full

    @property
    def chosen(self) -> Selection:
        return Selection(self.selection, self.seed, self.prior, self.prior_weight)

    @property
    def draws(self) -> bool:
        return self.selection not in ("topk", "magnitude")

    @property
    def shares(self) -> float | list[float]:
        """The sparsity as Engine takes it."""
        return list(self.sparsity) if isinstance(self.sparsity, tuple) else self.sparsity

    @property
    def _layers(self) -> tuple[float, ...]:
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    def label(self) -> str:
        """Short and for people: 'full', '50%', '50% random seed 1 int4, rest int4'. Defaults are left out."""
        if self.full:
            return "full"
        words = [f"{100 * sum(self._layers) / len(self._layers):.4g}%"]
        words += ["by layer"] if isinstance(self.sparsity, tuple) else []
        words += [self.selection] if self.selection != "topk" else []
        words += [f"seed {self.seed}"] if self.seed and self.draws else []
        words += [self.allocation] if self.allocation != "uniform" else []
        words += [self.resident_dtype] if self.resident_dtype != "bfloat16" else []
        words += [f"prior {self.prior_weight:g}"] if self.prior else []
        words += [f"skip {self.skip.share:.4g} by {self.skip.mode}"] if self.skip else []
        return " ".join(words) + (f", rest {self.rest}" if self.rest != "drop" and any(self._layers) else "")

    def plan(self, engine: Engine, prompt_tokens: int, max_new_tokens: int) -> Plan:
        """What such a run would hold, whether or not it fits. Raises OptionError for 'sensitivity' of what is not
        calibrated: an answer may do with 'uniform' instead, but a measurement would bear a wrong name."""
        if self.allocation == "sensitivity" and not self.full and engine.opened.curves() is None:
            raise OptionError(
                f"{engine.name} is not calibrated: run `griffin calibrate` once, or leave out allocation 'sensitivity'"
            )
        request = engine.opened.request(prompt_tokens, max_new_tokens)
        how = precision(self.resident_dtype, self.rest)
        curves = None if self.allocation == "uniform" else engine.opened.curves()
        return make_plan(
            engine.sizes, replace(request, sparsity=self.sparsity, curves=curves, precision=how, skip=self.skip)
        )

    def row(self, engine: Engine) -> Row:
        """As a row of a passage, which packs nothing. Raises OptionError as `plan`."""
        kept = replace(self, skip=None).plan(engine, 1, 1).kept
        return Row(self.chosen, kept, self.skip, self.instead, self.static)

    def plan_options(self) -> dict[str, Any]:
        """Keyword arguments for `Engine.plan`, besides the sparsity."""
        return {"allocation": self.allocation, "resident_dtype": self.resident_dtype, "rest": self.rest}

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Engine.sweep` and `Engine.generate`, besides the sparsity.

        The seed only where the selection draws, since `generate` would draw tokens by it too."""
        seed = {"seed": self.seed} if self.draws else {}
        prior = {"prior": self.prior, "prior_weight": self.prior_weight} if self.prior else {}
        skip = {"skip": self.skip} if self.skip else {}
        return {"selection": self.selection, **self.plan_options(), **seed, **prior, **skip}


FULL = Variant(0.0)


def all_variants(
    sparsities: Sequence[float],
    selections: Sequence[str],
    allocations: Sequence[str],
    seed: int = 0,
    resident_dtypes: Sequence[str] = ("bfloat16",),
    rests: Sequence[str] = ("drop",),
) -> list[Variant]:
    """Every combination, in this order. At sparsity 0 there is nothing to select, to share or to drop: it stands once
    for each resident dtype."""
    found = [
        Variant(sparsity, how, where, seed, dtype, rest) if sparsity else Variant(0.0, resident_dtype=dtype)
        for sparsity, how, where, dtype, rest in product(sparsities, selections, allocations, resident_dtypes, rests)
    ]
    return list(dict.fromkeys(found))


def with_prior(engine: Engine, variants: Sequence[Variant], path: Path, weights: Sequence[float] = ()) -> list[Variant]:
    """The same variants with a file's prior, by each of the weights (default: one); the full model once.

    Raises GriffinError for a file that is no prior, OptionError for another model's."""
    prior = load_prior(path)
    engine.opened.check_prior(prior)
    found = [
        variant if variant.full else replace(variant, prior=prior, prior_weight=weight)
        for variant, weight in product(variants, weights or (WEIGHT,))
    ]
    return list(dict.fromkeys(found))
