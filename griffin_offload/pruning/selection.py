"""A statistic -> the neurons to keep (arXiv:2404.01365, section 4.1 and appendix)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..options import SELECTIONS, Sparsity, check
from .prior import Prior, weight_at


def check_sparsity(sparsity: float) -> float:
    """The share of neurons to drop, in [0, 1]. Raises OptionError."""
    if not 0 <= sparsity <= 1:
        raise OptionError(
            f"sparsity {sparsity} is outside [0, 1]: 0 keeps all neurons, 0.5 half of them, 1 removes the blocks"
        )
    return float(sparsity)


def check_sparsities(sparsity: Sparsity) -> Sparsity:
    """`check_sparsity` of one number, or of one for each layer (as a tuple)."""
    if isinstance(sparsity, int | float):
        return check_sparsity(sparsity)
    return tuple(check_sparsity(share) for share in sparsity)


def kept_neurons(neurons: int, sparsity: float) -> int:
    """F neurons -> k = int(F (1 - sparsity)), at least 1; 0 for sparsity 1."""
    return 0 if check_sparsity(sparsity) == 1 else max(1, int(neurons * (1 - sparsity)))


@dataclass(frozen=True)
class Selection:
    """How the kept neurons are chosen. 'topk', the paper's choice: the largest statistic. The others are baselines:
    'sampling' draws without replacement, with weights s; 'topk-sampling' does half and half; 'magnitude' takes the
    largest product of the norms in gate and up; 'random' draws evenly. Draws depend on `seed` and the layer.

    `prior`: scores of other texts, mixed with the statistic. `prior_weight`: 0 is the prompt alone, 1 the prior; None:
    the longer the prompt, the less (see Prior.join)."""

    name: str = "topk"
    seed: int = 0
    prior: Prior | None = None
    prior_weight: float | None = None

    def __post_init__(self) -> None:
        check(self.name, SELECTIONS, "selection")
        if self.prior_weight is not None and not 0 <= self.prior_weight <= 1:
            raise OptionError(f"prior weight {self.prior_weight} is outside [0, 1]: 0 is the prompt's own choice")

    def prior_facts(self, tokens: float) -> dict[str, Any] | None:
        """The prior's facts, and its weight beside a prompt of so many tokens, for cards and reports."""
        if self.prior is None:
            return None
        weight = weight_at(tokens) if self.prior_weight is None else self.prior_weight
        return {**self.prior.facts, "weight": weight}

    def choose(
        self, statistic: Tensor, kept: int, layer: int, magnitude: Callable[[], Tensor], block: int = 0
    ) -> Tensor:
        """Statistic s² (..., F) -> indices of the kept neurons (..., kept), int64, ascending.

        `magnitude()` -> (..., F), called if needed. The leading dimension is the routed experts of a mixture."""
        if self.prior is not None:
            statistic = self.prior.join(statistic, layer, block, self.prior_weight)
        scores = magnitude() if self.name == "magnitude" else statistic
        if self.name in ("topk", "magnitude"):
            return select_neurons(scores, kept)
        generator = torch.Generator().manual_seed(self.seed * 10007 + layer)
        flat = scores.reshape(-1, scores.shape[-1]).cpu()
        rows = [self._draw(row, kept, generator) for row in flat]
        return torch.stack(rows).view(*scores.shape[:-1], kept).to(statistic.device)

    def _draw(self, statistic: Tensor, kept: int, generator: torch.Generator) -> Tensor:
        """(F,) -> (kept,), on the CPU."""
        if self.name == "random":
            return torch.randperm(len(statistic), generator=generator)[:kept].sort().values
        first = select_neurons(statistic, kept // 2 if self.name == "topk-sampling" else 0)
        weights = statistic.sqrt()
        weights = weights.clamp_min(max(1e-6 * weights.max().item(), 1e-30))  # neurons at 0 come last, but may come
        weights[first] = 0
        drawn = kept - len(first)
        rest = torch.multinomial(weights, drawn, generator=generator) if drawn else first[:0]
        return torch.cat([first, rest]).sort().values


def select_neurons(statistic: Tensor, kept: int) -> Tensor:
    """Statistic (..., F) -> indices of the k largest (..., k), int64, ascending, so that gathers walk forwards.

    Of equals (neurons that ReLU left at 0) the first, so that the choice is the same everywhere."""
    return statistic.argsort(descending=True, stable=True)[..., :kept].sort().values


def magnitude(rows: Sequence[Tensor]) -> Tensor:
    """Rows of gate and up, each (..., F, D) -> the product of their norms by neuron: (..., F), float32."""
    product = torch.ones((), dtype=torch.float32)
    for weight in rows:
        product = product.to(weight.device) * weight.norm(dim=-1, dtype=torch.float32)
    return product
