"""The reading threads: layer i + 1 is read while layer i computes, into a ring of buffers."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

Job = Callable[[], None]


@dataclass(frozen=True)
class Load:
    """What brings one layer: `jobs`, which any threads may run at the same time; `complete` runs after the last."""

    jobs: Sequence[Job]
    complete: Job = lambda: None


class Prefetch:
    """Loads layers in order on some threads, never more than `ring` of them ahead of what was given back.

    Layers i and i + ring may share buffers. A context manager: leaving it stops the threads, whatever happened.
    """

    def __init__(self, layers: Sequence[Load], ring: int, threads: int = 1) -> None:
        self._layers, self._room = layers, ring  # how many layers may have begun
        self._todo = deque((index, job) for index, layer in enumerate(layers) for job in layer.jobs or [lambda: None])
        self._missing = [max(1, len(layer.jobs)) for layer in layers]
        self._ready: list[Future[None]] = [Future() for _ in layers]
        self._stopping = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name="griffin-reader", daemon=True) for _ in range(threads)]

    def __enter__(self) -> "Prefetch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait(self, layer: int) -> None:
        """Return when a layer is in memory. Raises what reading it raised."""
        self._ready[layer].result()

    def release(self) -> None:
        """Give the buffers of the oldest layer back to the threads."""
        with self._changed:
            self._room += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the jobs that run now, and wait for them: their buffers may then go."""
        self._stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._layers = ()
        self._todo.clear()

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _run(self) -> None:
        while task := self._next():
            index, job = task
            try:
                job()
                self._end(index)
            except BaseException as error:  # the computing thread raises it
                self._stop()  # earlier layers have all begun, and end on other threads
                with self._changed:
                    if not self._ready[index].done():
                        self._ready[index].set_exception(error)
                return

    def _next(self) -> tuple[int, Job] | None:
        """The next job, once its layer may begin; None if there is no more to do."""
        with self._changed:
            while self._todo and not self._stopping:
                if self._todo[0][0] < self._room:
                    return self._todo.popleft()
                self._changed.wait()
            return None

    def _end(self, index: int) -> None:
        with self._changed:
            self._missing[index] -= 1
            if self._missing[index]:
                return
        self._layers[index].complete()
        self._ready[index].set_result(None)
