"""Several matrices for the same tokens in one product; and one matrix in two parts, each in its own format."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from ..memory.arena import Arena
from . import onednn
from .formats import allocate_weight
from .weight import DerivedCache, RowsOf, Scratch, Stored, Weight


class _Joined:
    """Matrices for the same tokens, stacked by rows: the first that is asked computes the product for all."""

    def __init__(self, weight: Stored, rows: Sequence[int]) -> None:
        self.weight, self._rows = weight, list(rows)
        self._outs, self._asked = DerivedCache(), 0

    def part(self, number: int, x: Tensor) -> Tensor:
        # A CUDA graph is replayed without this code, so its capture must not find a product from before. It does not:
        # a step makes each x anew, and the last part to ask frees the product. (Tensors of torch.inference_mode are
        # never found: each part would compute the whole product.)
        outs = self._outs.get(x)
        if outs is None:
            outs = self.weight.linear(x).split(self._rows, -1)
            self._outs.put(x, outs)
            self._asked = 0
        self._asked += 1
        if self._asked == len(self._rows):  # every part has been asked: free the product
            self._outs.forget()
        return cast(Tensor, outs[number])


class Part:
    """One of the joined matrices: rows [first, last)."""

    def __init__(self, joined: _Joined, number: int, first: int, last: int) -> None:
        self._joined, self._number, self._first, self._last = joined, number, first, last
        self.kernel = joined.weight.kernel

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        begin, end = self._first + first, self._last if last is None else self._first + last
        self._joined.weight.fill(rows, scratch, begin, end)

    def linear(self, x: Tensor) -> Tensor:
        return self._joined.part(self._number, x)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All tensors count as the first part's: a token reads them once."""
        return [tensor[: None if self._number == 0 else 0] for tensor in self._joined.weight.tensors]


def take_joined(format: str, arena: Arena, rows: Sequence[int], columns: int, dtype: torch.dtype) -> list[Stored]:
    """`allocate_weight` for several matrices with these row counts, for the same tokens: joined if each begins at a
    kernel's block. They take no more memory than each by itself."""
    if len(rows) == 1 or any(count % onednn.BLOCK for count in rows):
        return [allocate_weight(format, arena, count, columns, dtype) for count in rows]
    ends = list(accumulate(rows))
    joined = _Joined(allocate_weight(format, arena, ends[-1], columns, dtype), rows)
    return [Part(joined, i, end - count, end) for i, (count, end) in enumerate(zip(rows, ends, strict=True))]


class Split:
    """A matrix over neurons in two weights: the kept neurons and the rest.

    `down`: neurons are its columns, else its rows. `halves`: in each part, and in the product, the rows of gate come
    before those of up."""

    def __init__(self, parts: Sequence[Weight], sizes: Sequence[int], down: bool, halves: bool = False) -> None:
        """`sizes`: neurons in each part."""
        self.parts = parts
        self._sizes, self._down, self._halves = list(sizes), down, halves

    def linear(self, x: Tensor) -> Tensor:
        if self._down:
            states = x.split(self._sizes, -1)
            return reduce(torch.add, (part.linear(z) for part, z in zip(self.parts, states, strict=True)))
        outs = [part.linear(x) for part in self.parts]
        if self._halves:
            outs = [half for halves in zip(*(out.chunk(2, -1) for out in outs), strict=True) for half in halves]
        return torch.cat(outs, -1)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]
