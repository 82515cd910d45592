"""A dense feed-forward block + experts -> the compact one: kept rows of up (and gate), kept columns of down."""

import torch
from torch import Tensor


def gather(dense: Tensor, index: Tensor, axis: int, out: Tensor) -> None:
    """Copy rows (axis 0) or columns (axis 1) of `dense` into `out`; index (k,), int64.

    Routed experts, `dense` (E, ., .) and index (E, k): each expert its own; `axis` counts within one expert."""
    if index.ndim == 2:
        for part, chosen, target in zip(dense, index, out, strict=True):
            gather(part, chosen, axis, target)
    elif axis == 0:
        torch.index_select(dense, 0, index, out=out)
    else:  # four times as fast as index_select along rows (measured: 5 ms, not 22, for half of 3072 x 8192)
        torch.gather(dense, 1, index.expand(len(dense), -1), out=out)
