"""What workers open in tests of the workers themselves: answers without a model, quickly, with faults on request."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from griffin_offload.errors import BudgetError


class FakeAnswers:
    """Each prompt is one number: the answer is its text; a negative one is a fault."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def facts(self) -> dict[str, Any]:
        return {"process": os.getpid(), "variable": os.environ.get("GRIFFIN_TEST_PLACE")}

    def answer(self, prompts: Mapping[int, list[int]], on_layer: Any) -> dict[int, Any]:
        on_layer(1, 1)
        (self._folder / f"{os.getpid()}.pid").touch()
        for (number,) in prompts.values():
            if number == -1:  # kills whoever answers it
                os.kill(os.getpid(), signal.SIGKILL)
            if number == -2:  # kills the first that answers it
                try:
                    (self._folder / "killed").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
            if number == -3:
                raise BudgetError("too big")
            if number == -4:
                raise RuntimeError("of a library")
            if number == -5:
                time.sleep(600)
            time.sleep(0.01)
        return {row: {"text": str(number), "process": os.getpid()} for row, (number,) in prompts.items()}


@dataclass(frozen=True)
class FakeWork:
    folder: Path
    model: str = ""  # for the nodes of a cluster, which look for it

    def open(self, place: Any, workers: int) -> FakeAnswers:
        return FakeAnswers(self.folder)


def fake_drive(setup: Any, pipe: connection.Connection) -> None:
    """As ray_driver.drive, without Ray."""
    answers = setup.work.open(setup.placement, 1)
    while True:
        method, arguments = pipe.recv()
        try:
            if method == "start":
                pipe.send(("done", ("told", 2)))
            elif method == "answer_all":
                pipe.send(("ended", "a worker ended"))
                for batch, prompts in arguments[0].items():
                    pipe.send(("rows", (batch, answers.answer(prompts, print))))
                pipe.send(("done", None))
            else:
                pipe.send(("done", getattr(answers, method)(*arguments)))
        except BudgetError as error:
            pipe.send(("failed", error))
