"""Expected tokens a second: the bytes that a token reads in each format, and the speed of each on this device."""

from ..quant.formats import FORMATS
from ..quant.precision import Precision
from .request import Request
from .sizes import BlockSizes, Kept, ModelSizes


def tokens_per_s(sizes: ModelSizes, request: Request, kept: Kept) -> float | None:
    """Tokens a second if products with the weights took all the time; None where the speeds were not measured."""
    return 1 / request.speeds.seconds(read_by_a_token(sizes, kept, request.precision)) if request.speeds else None


def read_by_a_token(sizes: ModelSizes, kept: Kept, precision: Precision) -> dict[str, int]:
    """Bytes that one token reads in each format (a name of FORMATS): all but an embedding that is not also lm_head.

    Every expert of a mixture counts, though a token is routed to a few of them."""
    read = dict.fromkeys(FORMATS, 0)
    if precision.head and sizes.head:
        rows, columns, _ = sizes.head
        read[precision.head] += int(FORMATS[precision.head].bytes(rows, columns, sizes.item))
    for layer, counts in zip(sizes.layers, kept, strict=True):
        if precision.others:
            each = (FORMATS[precision.others].bytes(*shape, layer.item) for shape in layer.matrices)
            read[precision.others] += sum(map(int, each))
        for block, count in zip(layer.blocks, counts, strict=True):
            if precision.kept:
                read[precision.kept] += _matrices(block, count, precision.kept)
            if precision.rest:
                read[precision.rest] += _matrices(block, block.neurons - count, precision.rest)
    whole = sizes.resident(kept, precision) - (0 if precision.head else sizes.lookup)
    read[""] += whole - sum(read.values())
    return read


def _matrices(block: BlockSizes, neurons: int, format: str) -> int:
    """Bytes of the block's quantized matrices of so many neurons: all but its biases."""
    return sum(t.quantized(neurons, block.routed, block.item, format) for t in block.tensors if t.width)
