"""What a stored weight matrix can do, the scratch memory for filling one, and the dense format.

(N, K): N rows (outputs), K columns (inputs). M tokens."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..memory.arena import Arena, padded
from .kernels import TORCH
from .products import dense_linear

GROUP = 32
LEAST = 16  # fewer rows or columns are not worth quantizing
CHUNK = 256  # rows quantized at a time: they fit the processor's cache
ON_GPU = 4 * CHUNK  # the same on a GPU: each chunk takes dozens of launches


class Scratch:
    """Memory for some rows while they are quantized. Allocated once and reused, so that the heap gets no holes."""

    def __init__(self, columns: int, item: int, device: str) -> None:
        """`columns` of the widest matrix; `item`: bytes of an element."""
        self._size, self._columns, self._device = self.bytes(columns, item, device), columns, device
        self._arena: Arena | None = None

    @staticmethod
    def bytes(columns: int, item: int, device: str) -> int:
        """Bytes for the gathered rows, their float32 values, and their codes."""
        return sum(padded(_at_once(device) * groups(columns) * GROUP * size) for size in (item, 4, 1))

    def rows(self, columns: int) -> int:
        """How many rows of a matrix are quantized at a time. On a GPU as many as there is room for."""
        more = 1 if self._device == "cpu" else groups(self._columns) // groups(columns)
        return _at_once(self._device) * more

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._arena is None:
            self._arena = Arena(self._size, self._device)
        return self._arena.take(shape, dtype)

    def rewind(self) -> None:
        """Before the next rows: tensors of the last ones must no longer be used."""
        if self._arena:
            self._arena.rewind()

    def free(self) -> None:
        self._arena = None


def _at_once(device: str) -> int:
    """Rows of the widest matrix that are quantized at a time."""
    return CHUNK if device == "cpu" else ON_GPU


# (begin, end, scratch) -> rows [begin, end) of a dense matrix, (end - begin, K); in the scratch if they are made.
RowsOf = Callable[[int, int, Scratch], Tensor]


class Weight(Protocol):
    """A matrix (N, K), in any format."""

    def linear(self, x: Tensor) -> Tensor:
        """x (..., K) -> x Wᵀ (..., N), in x's dtype."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that a token reads."""


class Stored(Weight, Protocol):
    """A matrix that can be filled. `kernel`: what multiplies a token by it (kernels.py)."""

    kernel: str

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        """Quantizes rows [first, last) (default: all) into place, a chunk at a time. `rows` counts from `first`."""


class Dense:
    """A matrix in the model's own dtype."""

    kernel = TORCH

    def __init__(self, arena: Arena, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.weight = arena.take((rows, columns), dtype)

    @staticmethod
    def bytes(rows: int, columns: int, item: int) -> int:
        return padded(rows * columns * item)

    def fill(self, rows: RowsOf, scratch: Scratch, first: int = 0, last: int | None = None) -> None:
        weight = self.weight[first:last]
        for begin, end in chunks(len(weight), scratch.rows(weight.shape[1])):
            scratch.rewind()
            weight[begin:end] = rows(begin, end, scratch)

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(x, self.weight)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self.weight,)


def groups(columns: int) -> int:
    return -(-columns // GROUP)


class DerivedCache:
    """One-entry cache of a value derived from a tensor; invalid once the tensor is changed or freed."""

    def __init__(self) -> None:
        self._last: tuple[Any, int, Any] | None = None  # tensor, its version, value

    def get(self, x: Tensor) -> Any:
        last = self._last
        return last[2] if last and last[0]() is x and last[1] == x._version else None

    def put(self, x: Tensor, value: Any) -> None:
        self._last = None if x.is_inference() else (weakref.ref(x), x._version, value)

    def forget(self) -> None:
        self._last = None


def chunks(end: int, size: int = CHUNK, begin: int = 0) -> Iterator[tuple[int, int]]:
    """(begin, end) of each chunk of rows."""
    for start in range(begin, end, size):
        yield start, min(start + size, end)


def linear_module(parent: nn.Module, name: str) -> Any | None:
    """The module with the weight `name`, if it only multiplies by it: torch's Linear or GPT-2's Conv1D. Else None."""
    path, _, attribute = name.rpartition(".")
    module = parent.get_submodule(path)
    return module if attribute == "weight" and type(module) in (nn.Linear, Conv1D) else None


def dense_matrix(module: Any, weight: Tensor) -> Tensor:
    """A linear module's weight as (N, K); Conv1D's is transposed."""
    return weight.t() if isinstance(module, Conv1D) else weight
