"""The queue of requests, and the one thread that answers them."""

import itertools
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator

from ..errors import GriffinError
from ..foreign import printable
from ..memory.heap import trim_heap
from .api_error import ApiError, api_error, client_left, stopping
from .asked import Request
from .respond import Cancelled, Event

Respond = Callable[[Request, Callable[[], bool]], Iterator[Event]]
_numbers = itertools.count()


class Job:
    """A request on its way. `on_event` hears of each event, then of None at the end or of what went wrong; it is
    called on the worker's thread."""

    def __init__(self, request: Request, on_event: Callable[[Event | ApiError | None], None]) -> None:
        self.request, self.on_event = request, on_event
        self.number, self.queued_at = next(_numbers), time.monotonic()
        self.cancelled = threading.Event()


class Worker:
    """Answers one job at a time, in the order in which they came. `waiting`: at most so many behind it."""

    def __init__(
        self,
        respond: Respond,
        waiting: int,
        *,
        recover: Callable[[], None] = lambda: None,
        on_wait: Callable[[float], None] = lambda seconds: None,
        debug: bool = False,
    ) -> None:
        """`recover` follows an error that nobody foresaw; `on_wait` hears of the seconds that a job has waited."""
        self._respond, self._most, self._recover, self._on_wait = respond, waiting, recover, on_wait
        self._debug = debug
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = False
        self._change = threading.Condition()
        self._typical_s = 1.0  # how long an answer takes: the average, where the newest count most
        self._thread = threading.Thread(target=self._run, name="griffin-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> bool:
        return self._running is not None

    def check_room(self) -> None:
        """Raises ApiError: 429 where too many wait, 503 where the server stops."""
        if self._stopping:
            raise stopping()
        waiting = len(self._jobs) + bool(self._running)
        if waiting > self._most:
            wait = math.ceil(max(1.0, self._typical_s * waiting))
            raise ApiError(
                429,
                f"{waiting} requests are here already, which is the most: try again in {wait} s",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=wait,
            )

    def submit(self, job: Job) -> None:
        """Raises what `check_room` does."""
        with self._change:
            self.check_room()
            self._jobs.append(job)
            self._change.notify_all()

    def cancel(self, job: Job) -> None:
        """The answer is no longer wanted. A job that waits is gone at once, the running one with its next token."""
        with self._change:
            job.cancelled.set()
            if job in self._jobs:
                self._jobs.remove(job)

    def stop(self) -> None:
        """Take no more jobs and refuse those that wait; the running one goes on."""
        with self._change:
            self._stopping = True
            refused = list(self._jobs)
            self._jobs.clear()
            self._change.notify_all()
        for job in refused:
            job.on_event(stopping())

    def cancel_running(self) -> None:
        with self._change:
            if self._running:
                self._running.cancelled.set()

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end after `stop`; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            self._on_wait(start - job.queued_at)
            self._do(job)
            with self._change:
                self._running = None
                self._typical_s += 0.3 * (time.monotonic() - start - self._typical_s)

    def _next(self) -> Job | None:
        with self._change:
            self._change.wait_for(lambda: self._stopping or self._jobs)
            if not self._jobs:
                return None
            self._running = self._jobs.popleft()
            return self._running

    def _do(self, job: Job) -> None:
        end: ApiError | None = None
        try:
            if job.cancelled.is_set():
                raise Cancelled
            for event in self._respond(job.request, job.cancelled.is_set):
                job.on_event(event)
        except Cancelled:
            end = stopping() if self._stopping else client_left()
        except BaseException as error:  # whatever it is, the thread goes on: without it no request gets an answer
            self._tell()
            end = api_error(error)
            if not isinstance(error, GriffinError | ApiError):
                try:
                    self._recover()
                    trim_heap()
                except Exception:
                    self._tell()
        job.on_event(end)

    def _tell(self) -> None:
        if self._debug:
            sys.stderr.write(printable(traceback.format_exc()))
