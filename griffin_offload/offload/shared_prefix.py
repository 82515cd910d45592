"""What prompts begin with alike, computed once: its keys and values, and the statistics of its neurons.

A batch stays as it is: every row is padded on the left to the longest, T tokens. Its cache is filled as if the model
had computed the first P columns: of a row that is padded by d, these are d columns of padding and P - d tokens of the
prefix. The pass computes the other columns: what is left of the prefix, and each row's own tokens. The statistics are
sums over tokens: each row counts the prefix's and those of its own.
B batch, H key and value heads, P tokens of the prefix, D head size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.cache_layers import InRoom
from ..planning.sizes import Kept
from .earlier_turns import Statistics, covering


@dataclass(frozen=True)
class SharedPrefix:
    """`ids`: its tokens; `cache`: of one row, with all of them in every layer; `statistics`: () where nothing was
    pruned."""

    ids: list[int]
    cache: Any
    statistics: Statistics

    def covers(self, kept: Kept, neurons: Kept) -> bool:
        """Whether it has `statistics_for` these."""
        return kept == neurons or (bool(self.statistics) and covering(self.statistics, kept, neurons) is not None)

    def statistics_for(self, kept: Kept, neurons: Kept) -> Statistics:
        """Those of the blocks of which less than the `neurons` are `kept`."""
        found = covering(self.statistics, kept, neurons)
        assert found is not None
        return found

    def lay_in(self, cache: Any, mask: Tensor) -> None:
        """Fills a new cache of B rows with the first P columns of a batch, mask (B, T)."""
        padding = (mask.shape[1] - mask.sum(1)).tolist()
        for layer, own in zip(cache.layers, self.cache.layers, strict=True):
            if isinstance(own, InRoom) and own.is_initialized:
                window = int(getattr(layer, "sliding_window", None) or 0)
                keys, values, first = own.held()
                assert not first
                count = min(len(self.ids), window or len(self.ids))
                layer.restore(_columns(keys, padding, count), _columns(values, padding, count), len(self.ids))


def _columns(states: Tensor, padding: Sequence[int], count: int) -> Tensor:
    """Keys or values of a prefix (1, H, P, D) -> the last `count` of the first P columns of rows that are padded by so
    many: (B, H, count, D), 0 for padding."""
    tokens = states.shape[2]
    columns = torch.zeros(
        len(padding), states.shape[1], count, states.shape[3], dtype=states.dtype, device=states.device
    )
    for row, before in enumerate(padding):
        begin = max(0, tokens - count - before)  # of the prefix's tokens that are in these columns
        held = states[0, :, begin : max(begin, tokens - before)]
        columns[row, :, count - held.shape[1] :] = held
    return columns
