"""How much of a checkpoint has room in the tier that workers share."""

import pytest

from griffin_offload.memory import shared_tier
from griffin_offload.memory.shared_tier import SharedTier
from griffin_offload.units import GIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GiB of RAM are free, and this process has 1 GiB."""
    monkeypatch.setattr(shared_tier, "available_memory", lambda: 20 * GIB)
    monkeypatch.setattr(shared_tier, "resident_set", lambda: GIB)


def test_by_default_it_is_what_the_workers_leave() -> None:
    tier = SharedTier(2)
    assert tier.share(10 * GIB, 5 * GIB, counts_process=True) == 1.0
    assert tier.share(22 * GIB, 5 * GIB, counts_process=True) == pytest.approx(0.5)  # 19 GiB - 2 x 4
    assert tier.share(22 * GIB, 4 * GIB, counts_process=False) == pytest.approx(0.5)
    assert SharedTier(4).share(22 * GIB, 5 * GIB, counts_process=True) == pytest.approx(3 / 22)
    assert tier.share(10 * GIB, GIB // 2, counts_process=True) == 1.0, "a worker that has all it needs"
    assert tier.share(10 * GIB, 30 * GIB, counts_process=True) == 0.0


def test_a_limit_counts_alone() -> None:
    assert SharedTier(2, 5 * GIB).share(10 * GIB, 30 * GIB, counts_process=True) == 0.5
    assert SharedTier(2, 0).share(10 * GIB, GIB, counts_process=True) == 0.0
    assert SharedTier(2, 11 * GIB).share(10 * GIB, GIB, counts_process=True) == 1.0
