"""Processes of this machine that answer rows, each with an engine of its own: one for each GPU, or several on the CPU.

The driver hands out batches one at a time, so that none waits for another, and alone writes what they answer. A worker
whose process ends gives its batch back to the others; one without a driver ends by itself."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import GriffinError, WorkerError
from ..jsonl import Row
from ..options import Decoding, OnLayer, Placement, Pruning
from .batches import Batch
from .places import Place
from .process import Process

if TYPE_CHECKING:
    from ..engine import Engine
    from .answers import Answers, Prompts

PATIENCE = 5.0  # seconds in which a worker ends
TRIES = 2  # of a batch whose worker ended: then its rows are at fault


@dataclass(frozen=True)
class Work:
    """How rows are answered: by which model, with which options."""

    model: str
    pruning: Pruning
    decoding: Decoding
    per_prompt: bool = False

    def open(self, placement: Placement, workers: int = 1) -> "Answers":
        """`workers`: processes of this machine that read the model."""
        from ..engine import Engine

        return self.by(Engine(self.model, placement, workers=workers))

    def by(self, engine: "Engine") -> "Answers":
        from .answers import Answers

        return Answers(engine, self.pruning, self.decoding, self.per_prompt)


class Answerers(Protocol):
    """One engine of this process, or several of others: `count` of them."""

    count: int

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of `Answers` returns, of one of them."""

    def answer_all(
        self, batches: Mapping[Batch, "Prompts"], on_layer: OnLayer, on_end: Callable[[str], None]
    ) -> Iterator[tuple[Batch, dict[int, Row]]]:
        """Each batch with its rows, as they are done. `on_end(text)` hears of a worker that ended.

        Raises what `Answers.answer` raises, WorkerError where all workers have ended."""


class InProcess:
    """The one engine of this process."""

    count = 1

    def __init__(self, answers: "Answers") -> None:
        self._answers = answers

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._answers, method)(*arguments)

    def answer_all(
        self, batches: Mapping[Batch, "Prompts"], on_layer: OnLayer, on_end: Callable[[str], None]
    ) -> Iterator[tuple[Batch, dict[int, Row]]]:
        for batch, prompts in batches.items():
            yield batch, self._answers.answer(prompts, on_layer)


def serve(work: Work, place: Place, pipe: connection.Connection) -> None:
    """A worker: opens its engine when it is first asked something, and answers (method, arguments) until the pipe is
    closed. A reply is ("layer", (done, total)), ("done", result) or ("failed", error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    os.environ.update(place.variables)
    answers: Answers | None = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answers = answers or work.open(place.placement, place.workers)
            if method == "answer":
                arguments = (*arguments, lambda done, total: pipe.send(("layer", (done, total))))
            pipe.send(("done", getattr(answers, method)(*arguments)))
        except GriffinError as error:
            pipe.send(("failed", error))
        except Exception as error:  # what is not ours does not always travel from one process to another
            pipe.send(("failed", WorkerError(f"{type(error).__name__}: {error}")))


def _end_with_the_driver() -> None:
    driver = parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


class Worker(Process):
    """By its number, for the user."""

    def __init__(self, number: int, work: Work, place: Place) -> None:
        super().__init__(serve, (work, place), f"griffin worker {number}", PATIENCE)
        self.number = number


class Workers:
    """Several workers, until `close`. Asked like one `Answers`: the first one answers what is no batch."""

    def __init__(self, work: Work, where: Sequence[Place]) -> None:
        self._workers: list[Worker] = []
        self.count = len(where)
        try:
            for number, place in enumerate(where):
                self._workers.append(Worker(number, work, place))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def call(self, method: str, *arguments: Any) -> Any:
        """Asks the first worker. Raises what it raises, WorkerError where its process ends."""
        worker = self._workers[0]
        try:
            worker.ask(method, *arguments)
            return worker.reply()[1]
        except (EOFError, OSError):
            raise WorkerError(f"a worker {worker.how_it_ended}: the same command goes on") from None

    def answer_all(
        self, batches: Mapping[Batch, "Prompts"], on_layer: OnLayer, on_end: Callable[[str], None]
    ) -> Iterator[tuple[Batch, dict[int, Row]]]:
        """As Answerers says. A batch on which two workers ended is the error of its rows; `on_layer` counts the layers
        of all batches."""
        waiting, tries = deque(batches), dict.fromkeys(batches, 0)
        at_work: dict[Worker, Batch] = {}
        idle = list(self._workers)
        while waiting or at_work:
            while waiting and idle:
                worker, batch = idle.pop(0), waiting.popleft()
                at_work[worker] = batch
                with suppress(OSError):  # told below, where its pipe is found to be at its end
                    worker.ask("answer", batches[batch])
            if not at_work:
                raise WorkerError("all workers have ended: the same command goes on")
            pipes = {worker.pipe: worker for worker in at_work}
            for pipe in connection.wait(list(pipes)):
                worker = pipes[pipe]  # type: ignore[index]
                try:
                    kind, value = worker.reply()
                except (EOFError, OSError):
                    batch = at_work.pop(worker)
                    tries[batch] += 1
                    told = f"worker {worker.number + 1} {worker.how_it_ended}"
                    self._workers.remove(worker)
                    worker.end()
                    on_end(f"{told}; {'the others go on' if self._workers else 'no other is left'}")
                    if tries[batch] < TRIES:
                        waiting.appendleft(batch)
                    else:
                        yield batch, {row: {"error": f"two workers ended on this prompt: {told}"} for row in batch}
                    continue
                if kind == "layer":
                    on_layer(*value)
                elif kind == "done":
                    idle.append(worker)
                    yield at_work.pop(worker), value
