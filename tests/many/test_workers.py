"""Workers: every batch is answered once, whoever ends; and none outlives its driver. With answers made up quickly."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_answers import FakeWork
from waiting import wait_for

from griffin_offload.errors import BudgetError, WorkerError
from griffin_offload.many.places import Place
from griffin_offload.many.workers import Workers
from griffin_offload.options import Placement

PLACES = [Place(Placement("cpu"), "CPU", {"GRIFFIN_TEST_PLACE": str(number)}) for number in range(3)]


def answer_all(folder: Path, numbers: list[int], places: list[Place] = PLACES) -> tuple[dict[int, Any], list[str]]:
    """What is written of each number's row, and what was told."""
    told: list[str] = []
    found: dict[int, Any] = {}
    with closing(Workers(FakeWork(folder), places)) as workers:  # type: ignore[arg-type]
        batches = {(row,): {row: [number]} for row, number in enumerate(numbers)}
        for batch, rows in workers.answer_all(batches, lambda done, total: None, told.append):
            assert set(batch) == set(rows)
            assert not found.keys() & rows.keys()
            found |= rows
    return found, told


def test_all_batches_are_answered_by_all_workers(tmp_path: Path) -> None:
    numbers = list(range(60))
    found, told = answer_all(tmp_path, numbers)
    assert {row: answer["text"] for row, answer in found.items()} == {row: str(row) for row in numbers}
    assert len({answer["process"] for answer in found.values()}) == len(PLACES)
    assert not told


def test_a_worker_gets_the_variables_of_its_place(tmp_path: Path) -> None:
    with closing(Workers(FakeWork(tmp_path), PLACES[1:])) as workers:  # type: ignore[arg-type]
        assert workers.call("facts")["variable"] == "1"


def test_the_others_do_what_a_dead_worker_had(tmp_path: Path) -> None:
    found, told = answer_all(tmp_path, [*range(20), -2, *range(20)])
    assert len(found) == 41
    assert found[20]["text"] == "-2"
    assert len(told) == 1
    assert "was ended by SIGKILL; the others go on" in told[0]


def test_a_prompt_on_which_two_workers_end_is_an_error_of_its_row(tmp_path: Path) -> None:
    found, told = answer_all(tmp_path, [-1, *range(20)])
    assert "two workers ended on this prompt" in found[0]["error"]
    assert "SIGKILL" in found[0]["error"]
    assert [found[row]["text"] for row in range(1, 21)] == [str(number) for number in range(20)]
    assert len(told) == 2


def test_where_all_workers_have_ended_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="all workers have ended: the same command goes on"):
        answer_all(tmp_path, [-1, -1, *range(20)], PLACES[:2])


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [(-3, BudgetError, "too big"), (-4, WorkerError, "RuntimeError: of a library")],
)
def test_an_error_of_a_worker_is_the_drivers(tmp_path: Path, number: int, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        answer_all(tmp_path, [*range(5), number])
    assert gone(tmp_path)


def gone(folder: Path) -> bool:
    """Whether every process that answered has ended."""
    return not any(Path("/proc", path.stem).exists() for path in folder.glob("*.pid"))


DRIVER = """
import sys
from contextlib import closing
from pathlib import Path
from fake_answers import FakeWork
from griffin_offload.many.places import Place
from griffin_offload.many.workers import Workers
from griffin_offload.options import Placement
if __name__ == "__main__":
    with closing(Workers(FakeWork(Path(sys.argv[1])), [Place(Placement("cpu"), "CPU")] * 2)) as workers:
        batches = {(row,): {row: [-5]} for row in range(2)}
        for _ in workers.answer_all(batches, lambda done, total: None, print):
            pass
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_driver(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    driver = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        driver.send_signal(how)
        driver.wait(30)
        wait_for(lambda: gone(tmp_path), 10)
    finally:
        driver.kill()
