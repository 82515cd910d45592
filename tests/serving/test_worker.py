"""The queue: order, limit, cancellation, errors, the end."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from griffin_offload.errors import PromptError
from griffin_offload.serving.api_error import ApiError
from griffin_offload.serving.respond import Cancelled
from griffin_offload.serving.worker import Job, Worker


class Scripted:
    """Answers each request as it is told: the request is what happens."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.done: list[Any] = []
        self.recovered = 0

    def respond(self, request: Any, cancelled: Callable[[], bool]) -> Iterator[Any]:
        if isinstance(request, BaseException):
            raise request
        if request == "wait":
            while not self.go.wait(0.01):
                if cancelled():
                    raise Cancelled
        self.done.append(request)
        yield request

    def recover(self) -> None:
        self.recovered += 1


class Told:
    def __init__(self, worker: Worker, request: Any) -> None:
        self.events: list[Any] = []
        self.over = threading.Event()
        self.job = Job(request, self._on_event)
        worker.submit(self.job)

    def _on_event(self, event: Any) -> None:
        self.events.append(event)
        if event is None or isinstance(event, ApiError):
            self.over.set()

    def wait(self) -> list[Any]:
        assert self.over.wait(20)
        return self.events


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    script = Scripted()
    yield script
    script.go.set()


@pytest.fixture
def worker(scripted: Scripted) -> Iterator[Worker]:
    worker = Worker(scripted.respond, 2, recover=scripted.recover)
    yield worker
    scripted.go.set()
    worker.stop()
    assert worker.join(20)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_jobs_are_answered_in_order_and_more_than_the_limit_are_refused(worker: Worker, scripted: Scripted) -> None:
    first = Told(worker, "wait")
    until(lambda: worker.running)
    others = [Told(worker, name) for name in ("a", "b")]
    with pytest.raises(ApiError) as caught:
        Told(worker, "c")
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    scripted.go.set()
    assert [told.wait() for told in (first, *others)] == [["wait", None], ["a", None], ["b", None]]
    assert scripted.done == ["wait", "a", "b"]
    until(lambda: not worker.running)
    assert Told(worker, "d").wait() == ["d", None]


def test_a_cancelled_job_leaves_the_queue_at_once(worker: Worker, scripted: Scripted) -> None:
    Told(worker, "wait")
    until(lambda: worker.running)
    waits = Told(worker, "a")
    worker.cancel(waits.job)
    assert worker.waiting == 0
    scripted.go.set()
    assert Told(worker, "b").wait() == ["b", None]
    assert scripted.done == ["wait", "b"]


def test_the_running_job_is_cancelled(worker: Worker, scripted: Scripted) -> None:
    runs = Told(worker, "wait")
    until(lambda: worker.running)
    worker.cancel(runs.job)
    (event,) = runs.wait()
    assert (event.status, scripted.recovered) == (499, 0)
    assert Told(worker, "b").wait() == ["b", None]


def test_errors_are_the_clients_and_the_worker_goes_on(worker: Worker, scripted: Scripted) -> None:
    (event,) = Told(worker, PromptError("too long")).wait()
    assert (event.status, event.message, scripted.recovered) == (400, "too long", 0)
    (event,) = Told(worker, ZeroDivisionError("secret")).wait()
    assert (event.status, scripted.recovered) == (500, 1)
    assert "secret" not in event.message
    assert Told(worker, "b").wait() == ["b", None]


def test_at_the_end_those_that_wait_are_refused_and_the_running_one_ends(worker: Worker, scripted: Scripted) -> None:
    runs = Told(worker, "wait")
    until(lambda: worker.running)
    waits = Told(worker, "a")
    worker.stop()
    assert [event.status for event in waits.wait()] == [503]
    with pytest.raises(ApiError):
        Told(worker, "b")
    scripted.go.set()
    assert runs.wait() == ["wait", None]
    assert worker.join(20)


def test_at_the_end_the_running_one_can_be_cancelled(worker: Worker) -> None:
    runs = Told(worker, "wait")
    until(lambda: worker.running)
    worker.stop()
    worker.cancel_running()
    assert [event.status for event in runs.wait()] == [503]
