"""The ways of pruning that a measurement compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine import Engine
from ..errors import OptionError
from ..plan import Plan, make_plan
from ..selection import Selection, check_sparsity


@dataclass(frozen=True)
class Variant:
    """One way of pruning. `sparsity`: of every layer, or of each; 0 is the full model, whatever the rest says.

    Raises OptionError for a sparsity out of range or an unknown selection."""

    sparsity: float | tuple[float, ...] = 0.5
    selection: str = "topk"
    allocation: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for share in self._layers:
            check_sparsity(share)
        Selection(self.selection, self.seed)

    @property
    def full(self) -> bool:
        return not any(self._layers)

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
        """Short and for people: 'full', '50%', '50% random seed 1 sensitivity'. Defaults are left out."""
        if self.full:
            return "full"
        words = [f"{100 * sum(self._layers) / len(self._layers):.4g}%"]
        words += ["by layer"] if isinstance(self.sparsity, tuple) else []
        words += [self.selection] if self.selection != "topk" else []
        words += [f"seed {self.seed}"] if self.seed and self.draws else []
        words += [self.allocation] if self.allocation != "uniform" else []
        return " ".join(words)

    def plan(self, engine: Engine, prompt_tokens: int, max_new_tokens: int) -> Plan:
        """What such a run would hold, whether or not it fits. Raises OptionError for 'sensitivity' of what is not
        calibrated: an answer may do with 'uniform' instead, but a measurement would bear a wrong name."""
        if self.allocation == "sensitivity" and not self.full and engine.curves() is None:
            raise OptionError(
                f"{engine.name} is not calibrated: run `griffin calibrate` once, or leave out allocation 'sensitivity'"
            )
        request = engine.request(prompt_tokens, max_new_tokens)
        return make_plan(engine.sizes, replace(request, sparsity=self.sparsity, share=engine.share(self.allocation)))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Engine.sweep` and `Engine.generate`, besides the sparsity.

        The seed only where the selection draws, since `generate` would draw tokens by it too."""
        seed = {"seed": self.seed} if self.draws else {}
        return {"selection": self.selection, "allocation": self.allocation, **seed}


FULL = Variant(0.0)


def all_variants(
    sparsities: Sequence[float], selections: Sequence[str], allocations: Sequence[str], seed: int = 0
) -> list[Variant]:
    """Every combination, in this order; sparsity 0 once: it is the full model with all of them."""
    product = [Variant(s, how, where, seed) for s in sparsities for how in selections for where in allocations]
    return list(dict.fromkeys(FULL if variant.full else variant for variant in product))
