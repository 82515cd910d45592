"""GRIFFIN neuron statistic (Dong, Chen, Chi 2024, arXiv:2404.01365).

z is the input of the down projection: the same tensor in every architecture.
"""

import torch
from torch import Tensor

CHUNK = 256  # tokens in float32 at a time, so that a long prompt adds little memory


def neuron_statistic(z: Tensor) -> Tensor:
    """Sum over tokens of squared row-normalised activations: z (..., T, F), any float dtype -> (F,), float32.

    Additive over chunks of the prompt. Its square root is the paper's s; the order is the same.
    An all-zero token (ReLU) adds 0, not NaN; every other token adds 1 to the sum over neurons.
    """
    total = torch.zeros(z.shape[-1], dtype=torch.float32, device=z.device)
    for chunk in z.reshape(-1, z.shape[-1]).split(CHUNK):
        rows = chunk.float()
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        total += rows.square_().sum(dim=0)
    return total
