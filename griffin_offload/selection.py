"""From a statistic to experts (arXiv:2404.01365, section 4.1): pure functions of tensors and numbers."""

from torch import Tensor

from .errors import OptionError


def check_sparsity(sparsity: float) -> float:
    """The share of neurons to drop, in [0, 1). Raises OptionError."""
    if not 0 <= sparsity < 1:
        raise OptionError(f"sparsity {sparsity} is outside [0, 1): 0 keeps all neurons, 0.5 half of them")
    return float(sparsity)


def kept_neurons(neurons: int, sparsity: float) -> int:
    """k = int(F (1 - sparsity)), at least 1."""
    return max(1, int(neurons * (1 - check_sparsity(sparsity))))


def select_experts(statistic: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` largest: statistic (F,) -> (k,), int64, ascending (gathers then walk memory forwards).

    Of equals (neurons that ReLU left at 0) the first ones, so that the choice is the same everywhere."""
    return statistic.argsort(descending=True, stable=True)[:kept].sort().values
