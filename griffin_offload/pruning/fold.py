"""The fold: the kept columns of a down projection take over what the dropped neurons gave a prompt.

    W' = W_E + (Z_D W_Dᵀ)ᵀ (Z_E Z_Eᵀ + λ m I)⁻¹ Z_E        m: the mean of the diagonal of Z_E Z_Eᵀ

Z (S, F): what enters the down projection W (D, F), a row for each token; E: the k kept neurons, D: the dropped ones.
Ridge regression on the prompt's own activations: of all matrices, W' (D, k) has the least |Z_E W'ᵀ - Z Wᵀ|² plus λ m
times its squared distance from W_E. In the dual form, which this is, the system has S equations. A bias stays."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = 512  # rows of Z at most
HELD_OUT = 16  # of a prompt's last tokens, a quarter at most: the fidelity is measured on what was not fitted to
ROWS = 256  # of a down projection at a time


def held_out(tokens: int) -> int:
    """How many of the last tokens of a prompt do not count for the fold."""
    return min(HELD_OUT, tokens // 4)


def fold_tokens(mask: Tensor) -> Tensor:
    """Which tokens of some prompts count for the fold: mask (B, T), 0 for padding on the left -> (B T,), bool.

    Not the first of a prompt, at which attention looks where it looks at nothing, nor the last, `held_out`. At most
    TOKENS, evenly spaced."""
    number, count = mask.cumsum(1), mask.sum(1, keepdim=True)
    held = (count // 4).clamp_max(HELD_OUT)
    places = ((number > 1) & (number <= count - held) & (mask > 0)).flatten().nonzero()[:, 0]
    if len(places) > TOKENS:
        places = places[torch.arange(TOKENS, device=places.device) * len(places) // TOKENS]
    tokens = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    tokens[places] = True
    return tokens


@dataclass(frozen=True, eq=False)
class Change:
    """What the fold adds to the kept columns, as a product: `left` (D, S) @ `right` (S, k)."""

    left: Tensor
    right: Tensor


def ridge(kept: Tensor, lost: Tensor, strength: float) -> Change:
    """Z_E (S, k), Z_D W_Dᵀ (S, D) and λ -> W' - W_E, in Z_E's dtype, which for float16 has too little room: in float32.

    Solved in float32. The unit of Z does not matter; activations of zero change nothing."""
    dtype = torch.float32 if kept.dtype == torch.float16 else kept.dtype
    left = _solve(kept.float(), lost.float(), strength).to(dtype)
    return Change(left.T.contiguous(), kept.to(dtype))


def predicted(z: Tensor, rows: Tensor, dropped: Tensor, strength: float) -> Tensor:
    """What the fold takes the dropped neurons for: z (N, F), 0 there, the prompt's Z (S, F), dropped (F,), bool
    -> (N, F), 0 where a neuron is kept.

    Added to z_E, it gives through W what z_E alone gives through W': a model can be scored without a W' of its own."""
    kept, others = rows[:, ~dropped].float(), rows[:, dropped].float()
    out = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
    out[:, dropped] = _solve(kept, kept @ z[:, ~dropped].float().T, strength).T @ others
    return out


def _solve(kept: Tensor, right: Tensor, strength: float) -> Tensor:
    """(Z_E Z_Eᵀ + λ m I)⁻¹ times some matrix (S, N), float32."""
    gram = kept @ kept.T
    diagonal = gram.diagonal()
    diagonal += (strength * diagonal.mean()).clamp_min(1e-20)
    triangle, _ = torch.linalg.cholesky_ex(gram)  # without waiting for a GPU to say that it can
    if kept.device.type == "cpu":  # two to three times as quick as a solve; a ridge has no small values
        return torch.cholesky_inverse(triangle) @ right
    return _solve_twice(triangle, right)  # the inverse waits for a GPU


def _solve_twice(triangle: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ times some matrix (S, N), of a lower triangle L (S, S)."""
    half = torch.linalg.solve_triangular(triangle, right, upper=False)
    out: Tensor = torch.linalg.solve_triangular(triangle.T, half, upper=True)
    return out


def joined(pieces: list[Tensor]) -> Tensor:
    """Rows of Z, at least one, in pieces (s, F), which are used up -> (S, F), none of them above 1.

    Scaled by a power of two, which is exact, so that float16 has room for their sums."""
    z = pieces.pop() if len(pieces) == 1 else torch.cat(pieces)
    pieces.clear()
    least, most = z.aminmax()
    z /= torch.maximum(-least, most).float().clamp_min(1e-20).log2().ceil().exp2()
    return z
