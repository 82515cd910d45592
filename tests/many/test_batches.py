"""Which rows come together: every row once, in the order and of the sizes that are asked for."""

import random

import pytest

from griffin_offload.many.batches import cut, largest


@pytest.mark.parametrize("alike", [False, True])
def test_batches_hold_every_row_once(alike: bool) -> None:
    lengths = [random.Random(n).randrange(9) for n in range(50)]
    for size in (1, 3, 50, 99):
        batches = cut(lengths, size, alike=alike)
        assert sorted(row for batch in batches for row in batch) == list(range(50))
        assert {len(batch) for batch in batches[:-1]} <= {size}
        assert batches == cut(lengths, lambda tokens: size, alike=alike)  # noqa: B023
    assert cut([3, 9, 5, 9], 2, alike=True) == [(1, 3), (2, 0)]
    assert cut([3, 9, 5, 9], 2, alike=False) == [(0, 1), (2, 3)]


def test_shorter_prompts_come_in_larger_batches() -> None:
    assert cut([8, 2, 2, 4, 2, 4], lambda tokens: 8 // tokens, alike=True) == [(0,), (3, 5), (1, 2, 4)]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100])
def test_the_largest_that_fits(most: int) -> None:
    for true in range(1, most + 1):
        assert largest(lambda n: n <= true, most) == true  # noqa: B023
