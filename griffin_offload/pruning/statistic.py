"""GRIFFIN neuron statistic (Dong, Chen, Chi 2024, arXiv:2404.01365).

z is the input of the down projection: the same tensor in every architecture.
"""

import torch
from torch import Tensor

CHUNK = 256  # tokens in float32 at a time, so that a long prompt adds little memory


def neuron_statistic(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over tokens of squared row-normalised activations: z (..., T, F), any float dtype -> (F,), float32.

    Additive over chunks of the prompt. Its square root is the paper's s; the order is the same.
    An all-zero token (ReLU) adds 0, not NaN; every other token adds its weight (as many as tokens, float32; 0 for
    padding, 1 over a sample's length in a batch where samples count equally; default 1) to the sum over neurons.
    """
    return _sum_of_squares(z, weights, unit=True)


def activation_squares(z: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over tokens of squared activations as they are: z (..., T, F), any float dtype -> (F,), float32.

    Additive like `neuron_statistic`; `weights` as there."""
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
