"""A dense feed-forward block + experts -> the compact one: kept rows of up (and gate), kept columns of down."""

import torch
from torch import Tensor


def gather(dense: Tensor, experts: Tensor, axis: int, out: Tensor) -> None:
    """Copy the experts' rows (axis 0) or columns (axis 1) of `dense` into `out`; experts (k,), int64."""
    torch.index_select(dense, axis, experts, out=out)
