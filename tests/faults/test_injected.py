"""A call of the system fails in the middle of a command: one line, nothing half-written, and the same command goes on.

A seeded sample; `make faults` tries every call with every error."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
from faults.commands import COMMANDS, Trials, make_inputs
from faults.injection import ERRNOS

pytestmark = pytest.mark.fault
SAMPLE = 3


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trials]:
    """trials(name): those of a command, which is run without a fault first."""
    folder = tmp_path_factory.mktemp("injected")
    inputs = make_inputs(folder / "inputs")
    return cache(lambda name: Trials(name, inputs, folder / "trials"))


@pytest.mark.parametrize("error", [*ERRNOS, "ENOSPC from there on"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_that_fails(trials: Callable[[str], Trials], name: str, error: str) -> None:
    made = trials(name)
    word, _, everything = error.partition(" ")
    calls = Random(f"{name}, {error}").sample(range(1, made.calls + 1), SAMPLE)
    wrong = [said for at in calls if (said := made.trial(at, ERRNOS[word], bool(everything)))]
    assert not wrong


def test_what_is_counted(trials: Callable[[str], Trials], tmp_path: Path) -> None:
    """Or all of these would pass because nothing ever fails."""
    names = trials("export").names
    assert {"open", "read", "preadv", "pwrite", "write", "mkdir", "rename", "fsync", "flock", "unlink"} <= names.keys()
