"""A weight's stored rows -> their places in the dense weight, a few at a time. R rows, C columns, E experts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import Tensor

from ..headers import Packed, Shape
from .formats import COLUMNS, EXPERTS, FORMATS
from .rows import Rows

CHUNK = 2**19  # numbers at a time, of a weight whose rows are not longer
SCRATCH = 32 * CHUNK  # bytes: what the formats allocate for so many numbers


class Stored(NamedTuple):
    """The tensor that has a part's numbers: its rows and columns, the bytes of one of these columns in a row, how many
    numbers a row gives, and after how many rows another expert begins."""

    rows: Rows
    bytes: int
    numbers: int
    period: int


def units(packed: Packed) -> int:
    """How many parts of equal size a weight can be read in."""
    place = FORMATS[packed.format].place
    if place == EXPERTS:
        return packed.shape[0]
    return packed.main.shape[1] if place == COLUMNS else prod(packed.shape[:-1])


def stored(packed: Packed) -> Stored:
    """Where a part of a weight is in the tensor that has its numbers."""
    format, main, item = FORMATS[packed.format], packed.main, packed.main.dtype.itemsize
    if format.place == COLUMNS:
        wide = packed.last - packed.first
        numbers = wide * format.rows(dict(packed.settings)) * format.columns(dict(packed.settings))
        rows = main.shape[0]
        return Stored(Rows(0, rows, packed.first, packed.last), wide * item, numbers, rows)
    each = packed.shape[2] if format.place == EXPERTS else 1
    width = main.bytes // item // (units(packed) * each)
    first, last = packed.first * each, packed.last * each
    if format.place == EXPERTS:
        return Stored(Rows(first, last, 0, width), width * item, packed.shape[1], each)
    return Stored(Rows(first, last, 0, width), width * item, packed.shape[-1], last - first)


def row_bytes(packed: Packed) -> int:
    """Bytes of a whole row of the tensor that has the numbers."""
    if FORMATS[packed.format].place == COLUMNS:
        return packed.main.shape[1] * packed.main.dtype.itemsize
    return stored(packed).bytes


def steps(packed: Packed, most: int) -> Iterator[Rows]:
    """Rows to read and decode together: at most `most` bytes and CHUNK numbers, or one row."""
    rows, size, numbers, period = stored(packed)
    count = max(1, min(CHUNK // max(1, numbers), most // max(1, size)))
    for begin in range(rows.first, rows.last, period or 1):
        for first in range(begin, begin + period, count):
            yield rows._replace(first=first, last=min(first + count, begin + period))


def dense(packed: Packed, rows: Rows, numbers: Tensor, sides: Mapping[str, Tensor]) -> Tensor:
    """Stored rows, of their own dtype (n, m) -> what they hold, as the format's library has it."""
    return FORMATS[packed.format].dense(numbers, sides, rows, dict(packed.settings))


def put(packed: Packed, flat: Tensor, rows: Rows, numbers: Tensor) -> None:
    """Writes decoded rows to their places in `flat`, the memory of the part, rounded as by Tensor.to."""
    format, shape = FORMATS[packed.format], packed.shape
    if format.place == COLUMNS:
        each = format.columns(dict(packed.settings))
        flat.view(-1, shape[1])[:, rows.first * each : rows.last * each] = numbers
    elif format.place == EXPERTS:
        expert, first = divmod(rows.first, shape[2])
        part = flat.view(-1, *shape[1:])[expert - packed.first]
        part[:, first : first + numbers.shape[1]] = numbers
    else:
        flat.view(-1, shape[-1])[rows.first - packed.first : rows.last - packed.first] = numbers


def scratch(weights: Iterable[Packed]) -> int:
    """Bytes that decoding any of these weights takes beside the reader's buffers: its steps, and its side tensors."""
    most = 0
    for packed in weights:
        whole = stored(packed).numbers
        held = sum(2 * info.bytes for _, info in packed.sides)
        most = max(most, held + SCRATCH * max(1, -(-whole // CHUNK)))
    return most


def part(packed: Packed, first: int, last: int) -> tuple[Shape, Packed]:
    """A part of a weight (or of a part of it): units [first, last) of what is there."""
    size = prod(packed.shape) // units(packed)
    return ((last - first) * size,), replace(packed, first=packed.first + first, last=packed.first + last)
