"""Signals at random moments: what can be cleaned up is, and the same command ends what was stopped, nothing twice.

`make faults` tries more moments."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

import pytest
from faults.commands import make_inputs
from faults.forks import SIGNALS, Forks, Signalled
from griffin_offload.cli._signals import Stopped, stopping

pytestmark = pytest.mark.fault
NAMES = ("export", "export --force", "export gguf", "generate --input", "calibrate")


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Signalled]]:
    folder = tmp_path_factory.mktemp("signals")
    inputs = make_inputs(folder / "inputs", layers=24)
    with Forks() as forks:
        yield cache(lambda name: Signalled(name, inputs, folder / name.replace(" ", ""), forks))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_at_a_random_moment(signalled: Callable[[str], Signalled], name: str, number: str) -> None:
    assert not signalled(name).trial(number, Random(f"{name}, {number}"))


ENDS = {"SIGINT": KeyboardInterrupt, "SIGTERM": Stopped, "SIGHUP": Stopped}


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.001)


class Deleted:
    """Gets a signal as it is deleted, where Python drops exceptions."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __del__(self) -> None:
        send(self._name)


@pytest.mark.parametrize("name", ENDS)
def test_a_signal_that_comes_as_an_object_is_deleted_is_not_lost(name: str) -> None:
    def run() -> None:
        Deleted(name)
        time.sleep(5)

    begin = time.monotonic()
    with pytest.raises(ENDS[name]), stopping():
        run()
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_next_signal_does_not_end_the_cleaning(name: str) -> None:
    cleaned = []

    def clean() -> None:
        try:
            send(name)
        finally:
            send("SIGTERM")
            send("SIGHUP")
            cleaned.append(name)

    with pytest.raises(Stopped) as stopped, stopping():
        clean()
    assert cleaned == [name]
    assert stopped.value.code == SIGNALS[name]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_ignored_signal_stays_ignored(name: str) -> None:
    before = signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        with stopping():
            send(name)
    finally:
        signal.signal(getattr(signal, name), before)
