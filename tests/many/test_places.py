"""Where workers run, on a machine with two GPUs."""

from collections.abc import Iterator

import pytest
from card import Card, install

from griffin_offload.errors import OptionError
from griffin_offload.many.places import places
from griffin_offload.memory import cuda
from griffin_offload.options import Placement


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install([Card(), Card()], monkeypatch)
    yield
    cuda.context.cache_clear()


def test_each_gpu_has_a_worker() -> None:
    found = places(Placement(device="cuda"), None)
    assert [place.variables for place in found] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


@pytest.mark.parametrize("device", ["all", "cuda:0,cuda:1"])
def test_gpus_that_are_named_hold_one_model_together(device: str) -> None:
    (place,) = places(Placement(device=device), None)
    assert (place.placement.device, dict(place.variables)) == ("cuda:0,cuda:1", {})
    assert places(Placement(device=device), 1) == [place]
    with pytest.raises(OptionError, match="--workers 2: cuda:0,cuda:1 hold one model together; leave --workers out"):
        places(Placement(device=device), 2)


def test_more_workers_than_the_memory_holds_are_refused_before_one_starts() -> None:
    with pytest.raises(OptionError, match=r"--workers 100000: there is room for \d+ at most, in .* of free memory"):
        places(Placement(device="cpu", device_memory="8GiB"), 100_000)
