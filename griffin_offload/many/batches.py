"""Which rows of a file share a reading of the model. Pure functions of their prompts: the same ones after a stop."""

from collections import defaultdict
from collections.abc import Callable, Sequence

Batch = tuple[int, ...]  # numbers of rows, from 0
Fitting = Callable[[int], int]  # tokens of the longest prompt -> how many such prompts may come together


SHARED = 64  # tokens at the beginning of prompts that are worth a pass of their own
GROUP = 8  # prompts that begin alike come in batches of their own where there are so many


def cut(prompts: Sequence[Sequence[int]], size: int | Fitting, *, alike: bool) -> list[Batch]:
    """All rows in batches of at most `size`. `prompts`: token ids, () for a row that has none.

    `alike`: rows that begin alike, and of these rows of one length, come together, longest first, so that little is
    padded and what is largest is seen early; for answers that do not depend on which rows are together. Otherwise the
    file's order."""
    batches: list[Batch] = []
    for rows in _groups(prompts) if alike else [list(range(len(prompts)))]:
        begin = 0
        while begin < len(rows):
            count = size if isinstance(size, int) else size(len(prompts[rows[begin]]))
            batches.append(tuple(rows[begin : begin + count]))
            begin += count
    return batches


def _groups(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows that begin alike, and at the end those that do so with few others; each longest first."""
    by_beginning: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, ids in enumerate(prompts):
        by_beginning[tuple(ids[:SHARED]) if len(ids) > SHARED else ()].append(row)
    groups = [rows for beginning, rows in by_beginning.items() if beginning and len(rows) >= GROUP]
    grouped = {row for rows in groups for row in rows}
    groups.append([row for row in range(len(prompts)) if row not in grouped])
    return [sorted(rows, key=lambda row: (-len(prompts[row]), row)) for rows in groups]


def shared_tokens(prompts: Sequence[list[int]], before: Sequence[int]) -> int:
    """How many tokens all prompts of a batch begin with alike, less than the shortest has: those that the last batch
    began with, `before`, if all of them are among these; 0 where they are not worth a pass."""
    most = min(map(len, prompts)) - 1
    pair = enumerate(zip(min(prompts), max(prompts), strict=False))  # what these have in common, all have
    tokens = min(most, next((index for index, (one, other) in pair if one != other), most))
    if SHARED <= len(before) <= tokens and prompts[0][: len(before)] == list(before):
        return len(before)
    return tokens if tokens >= SHARED and len(prompts) > 1 else 0


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where every smaller one does; 1 is taken to."""
    if fits(most):
        return most
    low, high = 1, most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
