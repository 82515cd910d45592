"""Which rows of a file share a reading of the model. Pure functions of their prompts: the same ones after a stop."""

from collections.abc import Callable, Sequence

Batch = tuple[int, ...]  # numbers of rows, from 0
Fitting = Callable[[int], int]  # tokens of the longest prompt -> how many such prompts may come together


def cut(lengths: Sequence[int], size: int | Fitting, *, alike: bool) -> list[Batch]:
    """All rows in batches of at most `size`. `lengths`: of their prompts in tokens, 0 for a row that has none.

    `alike`: rows of one length come together, longest first, so that little is padded and what is largest is seen
    first; for answers that do not depend on which rows are together. Otherwise the file's order."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)) if alike else range(len(lengths))
    batches: list[Batch] = []
    begin = 0
    while begin < len(order):
        count = size if isinstance(size, int) else size(lengths[order[begin]])
        batches.append(tuple(order[begin : begin + count]))
        begin += count
    return batches


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where every smaller one does; 1 is taken to."""
    if fits(most):
        return most
    low, high = 1, most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
