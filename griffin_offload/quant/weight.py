"""A stored matrix (N, K): its protocol, the scratch memory that fills it, and the dense one.

N rows (outputs), K columns (inputs), M tokens.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..memory.arena import Arena, padded

GROUP = 32
LEAST = 16  # rows and columns of a matrix that is worth packing
CHUNK = 256  # rows quantised or made dense at a time: they stay in the processor's cache


class Scratch:
    """What CHUNK rows of a matrix pass through on their way into packed weights: taken at the first use, and then used
    again, so that packing leaves no holes in the heap."""

    def __init__(self, columns: int, item: int, device: str) -> None:
        """`columns`: of the widest matrix; `item`: bytes of its elements."""
        self._size, self._device = self.bytes(columns, item), device
        self._arena: Arena | None = None

    @staticmethod
    def bytes(columns: int, item: int) -> int:
        """Rows as they are gathered, in float32, and as codes."""
        return sum(padded(CHUNK * groups(columns) * GROUP * size) for size in (item, 4, 1))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._arena is None:
            self._arena = Arena(self._size, self._device)
        return self._arena.take(shape, dtype)

    def rewind(self) -> None:
        """For the next rows: what was taken for the last must no longer be used."""
        if self._arena:
            self._arena.rewind()

    def free(self) -> None:
        self._arena = None


# Rows begin to end of a dense matrix: (end - begin, K), of the scratch if they lie nowhere yet.
RowsOf = Callable[[int, int, Scratch], Tensor]


class Weight(Protocol):
    """A matrix (N, K) that knows its product."""

    def linear(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in x's dtype."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What a token reads of it."""


class Stored(Weight, Protocol):
    """One that is in one piece."""

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        """Take the values of the rows from `first` to `last`, or all, a few at a time: `rows` counts from `first`."""


class Dense:
    """A matrix in the model's own dtype."""

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.weight = arena.take((rows, columns), dtype)

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        return padded(rows * columns * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        weight = self.weight[first:last]
        for begin, end in chunks(len(weight)):
            scratch.rewind()
            weight[begin:end] = rows(begin, end, scratch)

    def linear(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self.weight,)


def groups(columns: int) -> int:
    return -(-columns // GROUP)


class Derived:
    """What was made of a tensor, as long as it lives unchanged."""

    def __init__(self) -> None:
        self._last: tuple[Any, int, Any] | None = None

    def get(self, x: Tensor) -> Any:
        last = self._last
        return last[2] if last and last[0]() is x and last[1] == x._version else None

    def put(self, x: Tensor, made: Any) -> None:
        self._last = None if x.is_inference() else (weakref.ref(x), x._version, made)

    def forget(self) -> None:
        self._last = None


def chunks(end: int, size: int = CHUNK, begin: int = 0) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, size):
        yield start, min(start + size, end)


def linear_module(parent: nn.Module, name: str) -> Any | None:
    """The module whose weight `name` is, if all that it does is to multiply by it: torch's Linear, GPT-2's Conv1D."""
    path, _, attribute = name.rpartition(".")
    module = parent.get_submodule(path)
    return module if attribute == "weight" and type(module) in (nn.Linear, Conv1D) else None


def dense_matrix(module: Any, weight: Tensor) -> Tensor:
    """A linear module's weight as (N, K): Conv1D's lies the other way round."""
    return weight.t() if isinstance(module, Conv1D) else weight
