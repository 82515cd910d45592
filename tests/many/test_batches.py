"""Which rows come together: every row once, in the order and of the sizes that are asked for."""

import random

import pytest

from griffin_offload.many.batches import GROUP, SHARED, cut, largest, shared_tokens


@pytest.mark.parametrize("alike", [False, True])
def test_batches_hold_every_row_once(alike: bool) -> None:
    prompts = [[n] * random.Random(n).randrange(9) for n in range(50)]
    for size in (1, 3, 50, 99):
        batches = cut(prompts, size, alike=alike)
        assert sorted(row for batch in batches for row in batch) == list(range(50))
        assert {len(batch) for batch in batches[:-1]} <= {size}
        assert batches == cut(prompts, lambda tokens: size, alike=alike)  # noqa: B023
    of_lengths = [[0] * length for length in (3, 9, 5, 9)]
    assert cut(of_lengths, 2, alike=True) == [(1, 3), (2, 0)]
    assert cut(of_lengths, 2, alike=False) == [(0, 1), (2, 3)]


def test_shorter_prompts_come_in_larger_batches() -> None:
    prompts = [[0] * length for length in (8, 2, 2, 4, 2, 4)]
    assert cut(prompts, lambda tokens: 8 // tokens, alike=True) == [(0,), (3, 5), (1, 2, 4)]


def test_prompts_that_begin_alike_come_together() -> None:
    first, second = list(range(SHARED)), list(range(1, SHARED + 1))
    prompts = [[*(first, second)[n % 2], *[n] * (n + 1)] for n in range(2 * GROUP)]
    prompts[6] = prompts[6][1:]  # begins otherwise
    assert cut(prompts, 99, alike=True) == [
        tuple(range(2 * GROUP - 1, 0, -2)),
        tuple(range(2 * GROUP - 2, -1, -2)),  # one too few for a batch of their own, and with them the other
    ]
    prompts[6] = [*first, 7]
    assert cut(prompts, 99, alike=True)[0] == (*range(2 * GROUP - 2, 6, -2), 4, 2, 0, 6)


def test_how_many_tokens_a_batch_shares() -> None:
    begin = list(range(SHARED))
    assert shared_tokens([[*begin, 7, 7], [*begin, 7, 8], [*begin, 7, 9]], ()) == SHARED + 1
    assert shared_tokens([[*begin, 7, 7], [*begin, 7, 8]], begin) == SHARED  # as the batch before
    assert shared_tokens([[*begin, 7, 7], [*begin, 7, 8]], [*begin, 7]) == SHARED + 1
    assert shared_tokens([[*begin, 7, 7], [*begin, 7, 8]], [*begin, 8]) == SHARED + 1
    assert shared_tokens([[*begin, 7], [*begin, 7]], ()) == SHARED  # one token at least is computed
    assert shared_tokens([begin, begin], ()) == 0  # too few
    assert shared_tokens([[*begin, 7, 8]], ()) == 0


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100])
def test_the_largest_that_fits(most: int) -> None:
    for true in range(1, most + 1):
        assert largest(lambda n: n <= true, most) == true  # noqa: B023
