"""Which rows of a file share a reading of the model. Pure functions of their prompts: the same ones after a stop."""

from collections.abc import Sequence

Batch = tuple[int, ...]  # numbers of rows, from 0


def cut(lengths: Sequence[int], size: int, *, alike: bool) -> list[Batch]:
    """All rows in batches of at most `size`. `lengths`: of their prompts in tokens, 0 for a row that has none.

    `alike`: rows of one length come together, longest first, so that little is padded and what is largest is seen
    first; for answers that do not depend on which rows are together. Otherwise the file's order."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)) if alike else range(len(lengths))
    return [tuple(order[begin : begin + size]) for begin in range(0, len(lengths), size)]
