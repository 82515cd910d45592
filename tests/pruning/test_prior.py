"""A prior (griffin_offload.pruning.prior): its file, and how it joins a prompt's statistic."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from griffin_offload.errors import GriffinError, OptionError
from griffin_offload.pruning.prior import TOKENS, Prior, check_prior, load_prior, save_prior
from griffin_offload.pruning.selection import Selection


def some_prior(seed: int = 0) -> Prior:
    generator = torch.Generator().manual_seed(seed)
    shapes = [[(8,)], [(8,), (3, 4)], []]
    return Prior(
        tuple(tuple(torch.rand(shape, generator=generator) for shape in layer) for layer in shapes),
        {"model": "tiny", "score": "griffin"},
    )


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    prior = some_prior()
    save_prior(tmp_path / "new" / "prior.safetensors", prior)
    again = load_prior(tmp_path / "new" / "prior.safetensors")
    assert again.shapes == prior.shapes == [[[8]], [[8], [3, 4]], []]
    assert all(map(torch.equal, sum(again.scores, ()), sum(prior.scores, ())))
    assert again.facts == {"layers": 3, "model": "tiny", "score": "griffin"}
    check_prior(again, prior.shapes, "tiny")


def test_shares_of_both_are_mixed_by_weight() -> None:
    prior = Prior(((torch.tensor([6.0, 2.0, 0.0, 0.0]),),))
    statistic = torch.tensor([0.0, 10.0, 0.0, 30.0])
    joined = prior.join(statistic, 0, 0, 0.4)
    assert joined.tolist() == pytest.approx([0.3, 0.25, 0.0, 0.45])
    assert prior.join(statistic, 0, 0, 0.0) is statistic
    assert prior.join(statistic, 0, 0, 1.0).tolist() == [6.0, 2.0, 0.0, 0.0]


def test_an_expert_that_saw_no_token_takes_the_priors_order() -> None:
    prior = Prior(((torch.tensor([[1.0, 2.0], [2.0, 1.0]]),),))
    statistic = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    chosen = Selection(prior=prior, prior_weight=0.4).choose(statistic, 1, 0, lambda: torch.empty(0))
    assert chosen.tolist() == [[1], [1]]


def test_without_a_weight_the_prior_counts_like_so_many_tokens() -> None:
    """Of every expert that many, so that one which saw few tokens leans on the prior."""
    prior = Prior(((torch.tensor([[1.0, 3.0], [3.0, 1.0]]),),))
    statistic = torch.tensor([[0.0, 0.0], [0.0, 10 * TOKENS]])
    joined = prior.join(statistic, 0, 0, None) / TOKENS
    assert joined.tolist() == [[0.25, 0.75], [0.75, 10.25]]
    assert Selection(prior=prior).choose(statistic, 1, 0, lambda: torch.empty(0)).tolist() == [[1], [1]]


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(OptionError, match="outside"):
        Selection(prior_weight=weight)


def test_a_prior_of_another_model_is_refused() -> None:
    with pytest.raises(OptionError, match="of tiny"):
        check_prior(some_prior(), [[[8]], [[8], [3, 4]], [[8]]], "other")


def test_what_is_no_prior_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(GriffinError, match="does not exist"):
        load_prior(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(GriffinError, match="is not a prior"):
        load_prior(path)
    save_file({"0.0": torch.ones(3)}, path)
    with pytest.raises(GriffinError, match="is not a prior"):
        load_prior(path)
    prior = some_prior()
    prior.scores[0][0][2] = float("nan")
    save_prior(path, prior)
    with pytest.raises(GriffinError, match="no numbers"):
        load_prior(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
