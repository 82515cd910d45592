"""The rotation of one token's queries and keys on a GPU: one kernel (triton_rotary.py) in place of ten of torch's.

Most model files of transformers have the same function for it. Where a trial shows that it is this one, it is replaced
in the file, for all models of it; whatever is no single token on a GPU goes on to the file's own."""

import sys
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"


def rotate_by_one_kernel(layer: nn.Module) -> None:
    """Replaces the function in the files of a decoder layer's modules."""
    for file in {sys.modules[type(module).__module__] for module in layer.modules()}:
        own = getattr(file, NAME, None)
        if own is not None and not isinstance(own, Rotation) and _is_common(own):
            setattr(file, NAME, Rotation(own))


class Rotation:
    """Takes the place of a file's function, `own`."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling() and unsqueeze_dim == 1 and _fits(q, k, cos, sin):
            kernel = kernel_on(q.device, q.dtype)
            if kernel is not None:
                return kernel(q, k, cos, sin)  # type: ignore[no-any-return]
        return self.own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)  # type: ignore[no-any-return]


@cache
def kernel_on(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The kernel for tensors of a device and dtype; None where it does not run, or rounds in another way than torch."""
    if device.type != "cuda":
        return None
    try:
        from .triton_rotary import rotate

        given = [x.to(device) for x in _trial(dtype)]
        return rotate if _are_equal(rotate(*given), common(*given)) else None
    except Exception:  # of Triton's many kinds
        return None


def common(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What the function of most files computes: q (B, H, T, D), k (B, G, T, D), cos and sin (B or 1, T, D)."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotated(q), rotated(k)


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are one token's, of shapes that the kernel takes."""
    sizes, rows = {x.shape[-1] for x in (q, k, cos, sin)}, {len(cos), len(sin)}
    one = q.ndim == k.ndim == 4 and q.shape[2] == k.shape[2] == 1 and cos.ndim == sin.ndim == 3
    alike = len({x.dtype for x in (q, k, cos, sin)}) == 1 and all(x.stride(-1) == 1 for x in (q, k, cos, sin))
    return one and alike and len(sizes) == 1 and q.shape[-1] % 2 == 0 and len(q) == len(k) and rows <= {1, len(q)}


def _is_common(own: Any) -> bool:
    with suppress(Exception):  # the function's: it may take other arguments
        return all(_are_equal(own(*_trial(dtype)), common(*_trial(dtype))) for dtype in (torch.bfloat16, torch.float32))
    return False


def _trial(dtype: torch.dtype) -> list[Tensor]:
    """q (2, 3, 1, 64), k (2, 2, 1, 64), cos and sin (2, 1, 64), the same ones each time."""
    numbers = torch.randn(2, 1, 7 * 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, cos, sin = numbers.split([3 * 64, 2 * 64, 64, 64], -1)
    return [q.view(2, 1, 3, 64).transpose(1, 2), k.view(2, 1, 2, 64).transpose(1, 2), cos, sin]


def _are_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True))
