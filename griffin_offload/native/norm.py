"""The RMS norm of a few tokens by our own C++ kernel: torch takes eight operators for it, whose calls take longer than
their work."""

from collections.abc import Callable

import torch
from torch import Tensor

from .library import chosen, library, number_of

WAYS = 3  # of src/norm.h
LARGEST = 2**16  # numbers; more are as quick by torch's threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, way: int, by: str = "") -> Tensor:
    """Rows (..., D), contiguous, and weights (D,), in bfloat16 -> normed rows. `way`: of WAYS. `by`: instructions."""
    out = torch.empty_like(x)
    columns = len(weight)
    numbers = x.numel() // columns, columns, eps, way, number_of(by or chosen())
    library().griffin_rms_norm(x.data_ptr(), weight.data_ptr(), *numbers, out.data_ptr())  # type: ignore[union-attr]
    return out


def way_of(norm: Callable[[Tensor, Tensor], Tensor], columns: int, eps: float) -> int | None:
    """The way that gives what `norm(x, weight)` gives, but for a rounding of one number in a hundred; None: none."""
    x, weight = (each.bfloat16() for each in trial(columns))
    expected = norm(x, weight)
    if expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    for way in range(WAYS):
        out = rms_norm(x, weight, eps, way)
        if (out != expected).float().mean() < 0.01 and torch.allclose(out.float(), expected.float(), rtol=0.01):
            return way
    return None


def trial(columns: int) -> tuple[Tensor, Tensor]:
    """Tokens (8, columns) and weights (columns,) to try a norm on, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, columns, generator=generator).mul_(3), torch.randn(columns, generator=generator)
