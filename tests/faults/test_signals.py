"""Signals at random moments: what can be cleaned up is, and the same command ends what was stopped, nothing twice.

`make faults` tries more moments."""

from collections.abc import Callable, Iterator
from functools import cache
from random import Random

import pytest
from faults.commands import make_inputs
from faults.forks import SIGNALS, Forks, Signalled

pytestmark = pytest.mark.fault
NAMES = ("export", "export --force", "export gguf", "generate --input", "calibrate")


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Signalled]]:
    folder = tmp_path_factory.mktemp("signals")
    inputs = make_inputs(folder / "inputs", layers=24)
    with Forks() as forks:
        yield cache(lambda name: Signalled(name, inputs, folder / name.replace(" ", ""), forks))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_at_a_random_moment(signalled: Callable[[str], Signalled], name: str, signal: str) -> None:
    random = Random(f"{name}, {signal}")
    wrong = [said for _ in range(2) if (said := signalled(name).trial(signal, random))]
    assert not wrong
