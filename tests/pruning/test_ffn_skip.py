"""The rule of skipped blocks (pruning/ffn_skip.py) on tables of similarities, against one token at a time."""

import math
from dataclasses import replace

import pytest
import torch

from griffin_offload.errors import OptionError
from griffin_offload.options import FfnSkip
from griffin_offload.pruning.ffn_skip import Thresholds, most_saturated, skipped_share


def skipped_slowly(similarities: list[float], skip: FfnSkip, threshold: float) -> list[int]:
    """The blocks that one token leaves out, as the paper tells it."""
    blocks, left, out = len(similarities), 0, []
    for block in range(blocks):
        cold = block < max(1, skip.cold[0]) or block >= blocks - skip.cold[1]
        if left and not cold:
            out.append(block)
            left -= 1
        else:
            left = skip.length(blocks) if similarities[block] >= threshold else 0
    return out


@pytest.mark.parametrize("run", [0, 1, 3])
@pytest.mark.parametrize("cold", [(0, 0), (1, 2), (3, 1), (9, 9)])
def test_the_share_of_a_threshold_is_what_each_token_skips_by_itself(run: int, cold: tuple[int, int]) -> None:
    similarity = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    skip = FfnSkip(0.5, cold=cold, run=run)
    thresholds = [-1.0, 0.3, 0.6, 0.9, 2.0]
    slow = [sum(len(skipped_slowly(row.tolist(), skip, level)) for row in similarity) for level in thresholds]
    found = skipped_share(similarity, skip, torch.tensor(thresholds))
    assert (found * similarity.numel()).round().tolist() == slow


def share_of(similarity: torch.Tensor, skip: FfnSkip) -> float:
    """What the found threshold skips."""
    return float(skipped_share(similarity, skip, torch.tensor([Thresholds(similarity, skip).of(skip.share)])))


@pytest.mark.parametrize("run", [0, 1, 3])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_threshold_skips_as_much_as_asked(run: int, share: float) -> None:
    similarity = torch.rand(200, 30, generator=torch.Generator().manual_seed(1))
    skip = FfnSkip(share, cold=(1, 1), run=run)
    reached = share_of(similarity, skip)
    possible = 14 / 30 if run == 1 else 28 / 30  # with runs of 1 every other block is computed
    assert min(share, possible) - 0.03 < reached <= share


def test_nothing_is_skipped_at_share_0_and_all_between_the_cold_ends_at_1() -> None:
    similarity = torch.rand(7, 10, generator=torch.Generator().manual_seed(2))
    assert math.isinf(Thresholds(similarity, FfnSkip(0.0)).of(0.0))
    everything = FfnSkip(1.0, cold=(2, 3))
    assert share_of(similarity, everything) == 0.5
    assert most_saturated(similarity[0], FfnSkip(1.0, "prompt", cold=(2, 3))) == [2, 3, 4, 5, 6]


def test_the_most_saturated_blocks_are_those_of_the_largest_similarity() -> None:
    similarity = torch.tensor([0.99, 0.5, 0.9, 0.7, 0.9, 0.8, 0.99])
    skip = FfnSkip(2 / 7, "prompt", cold=(1, 1), run=7)
    assert most_saturated(similarity, skip) == [2, 4]
    assert most_saturated(similarity, replace(skip, share=3 / 7)) == [2, 4, 5]
    assert most_saturated(similarity, replace(skip, share=0.9, cold=(0, 7))) == []


def test_neighbours_stay_while_others_can_leave() -> None:
    similarity = torch.tensor([0.1, 0.8, 0.9, 0.7, 0.6, 0.1])
    assert most_saturated(similarity, FfnSkip(2 / 6, "prompt", cold=(1, 1), run=1)) == [2, 4]
    assert most_saturated(similarity, FfnSkip(3 / 6, "prompt", cold=(1, 1), run=1)) == [1, 2, 4]
    assert most_saturated(similarity, FfnSkip(3 / 6, "prompt", cold=(1, 1), run=2)) == [1, 2, 4]
    assert most_saturated(similarity, FfnSkip(4 / 6, "prompt", cold=(1, 1), run=1)) == [1, 2, 3, 4]


@pytest.mark.parametrize(("share", "run"), [(0.1, 1), (0.4, 1), (0.5, 2), (0.6, 2), (0.7, 3), (0.8, 10), (1.0, 10)])
def test_runs_are_as_short_as_the_share_allows(share: float, run: int) -> None:
    skip = FfnSkip(share, cold=(1, 1))
    assert skip.length(12) == run
    saturated = torch.ones(1, 12)
    assert skipped_share(saturated, skip, torch.zeros(1)) >= min(share, 10 / 12) - 0.5 / 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": -0.1},
        {"share": 1.1},
        {"share": 0.5, "mode": "layer"},
        {"share": 0.5, "cold": (-1, 0)},
        {"share": 0.5, "warmup": -1},
        {"share": 0.5, "run": -2},
    ],
)
def test_a_bad_option_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        FfnSkip(**wrong)  # type: ignore[arg-type]
