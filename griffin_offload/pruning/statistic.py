"""Scores of feed-forward neurons: GRIFFIN's statistic (Dong, Chen, Chi 2024, arXiv:2404.01365), and others.

z (T, F) is the input of the down projection, whose matrix is W (D, F): the same tensor in every architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # tokens in float32 at a time, so that a long prompt adds little memory
Sums = Callable[[Tensor, Tensor | None], Tensor]


def neuron_statistic(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over tokens of squared row-normalised activations: z (..., T, F), any float dtype -> (F,), float32.

    Additive over chunks of the prompt. Its square root is the paper's s; the order is the same. `weights` (..., T),
    float32: each token's weight, 0 for padding, 1/length so that prompts of a batch count equally; None: 1 each.
    An all-zero token (ReLU) adds 0, not NaN."""
    return _sum_of_squares(z, weights, unit=True)


def activation_squares(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over tokens of squared activations: z (..., T, F), any float dtype -> (F,), float32.

    Additive like `neuron_statistic`, with the same `weights`."""
    return _sum_of_squares(z, weights, unit=False)


def _sum_of_squares(z: Tensor, weights: Tensor | None, unit: bool) -> Tensor:
    total = torch.zeros(z.shape[-1], dtype=torch.float32, device=z.device)
    tokens = z.reshape(-1, z.shape[-1])
    shares = [None] * (-(-len(tokens) // CHUNK)) if weights is None else weights.reshape(-1).split(CHUNK)
    for chunk, share in zip(tokens.split(CHUNK), shares, strict=True):
        rows = chunk.float()
        if unit:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        squares = rows.square()
        total += squares.sum(dim=0) if share is None else share @ squares
    return total


class NeuronWeights(NamedTuple):
    """What a score may need of a block's weights: functions that return (F,) or (E, F), float32."""

    up_norms: Callable[[], Tensor]  # product of the norms of a neuron's rows in gate and up
    down_squares: Callable[[], Tensor]  # squared norm of a neuron's column in the down projection


@dataclass(frozen=True)
class Statistic:
    """How neurons are scored over calibration texts. `title`: for model cards.

    `sums`: z (..., T, F) and token weights -> (F,), added up over all texts; None: the score needs no text.
    `finish`: the sums, the block's weights and a seed -> the scores; None: the sums are the scores."""

    title: str
    sums: Sums | None = None
    finish: Callable[[Tensor, NeuronWeights, int], Tensor] | None = None


def _random(total: Tensor, weights: NeuronWeights, seed: int) -> Tensor:
    return torch.rand(total.shape, generator=torch.Generator().manual_seed(seed))


STATISTICS = {
    "griffin": Statistic("GRIFFIN (arXiv:2404.01365)", neuron_statistic),
    # Wanda's |x| |w| (Sun et al. 2023) for a neuron as a whole.
    "wanda": Statistic(
        "Wanda of whole neurons (after arXiv:2306.11695)",
        activation_squares,
        lambda total, weights, _: total * weights.down_squares(),
    ),
    "magnitude": Statistic("magnitude of gate and up", None, lambda _, weights, __: weights.up_norms().square()),
    "random": Statistic("random neurons", None, _random),
}
