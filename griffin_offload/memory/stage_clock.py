"""How long each stage of a prompt pass works: reading, copies to the pinned buffers, the bus, computing.

The stages work at the same time. The one that works longest bounds the pass."""

import threading
import time
from dataclasses import dataclass
from typing import Any

NAMES = {"read": "reading", "host_copy": "copies in RAM", "bus": "the bus", "compute": "computing"}


@dataclass(frozen=True)
class Stages:
    """Seconds of one prompt pass, `total` in all.

    `read` and `host_copy` (RAM to a pinned piece, and back): of the `threads` that read, on average. `bus`: of copies
    to the device. `compute`: of the layers' forwards. `wait`: how long the computing thread waited for layers;
    `layers`: of each layer, how long it was waited for, and what followed."""

    threads: int
    total: float
    read: float
    host_copy: float
    bus: float
    compute: float
    wait: float
    layers: tuple[tuple[float, float], ...] = ()

    @property
    def bound_by(self) -> str:
        """The stage that worked longest, in words."""
        return NAMES[self._longest]

    def __str__(self) -> str:
        return f"{self.bound_by} ({getattr(self, self._longest):.2f} of {self.total:.2f} s)"

    @property
    def _longest(self) -> str:
        return max(NAMES, key=lambda name: float(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        seconds = {f"{name}_s": getattr(self, name) for name in ("total", *NAMES, "wait")}
        longest = f"{self._longest}_s"
        return {"reader_threads": self.threads, **seconds, "longest": longest, "bound_by": self.bound_by}


class StageClock:
    """Adds up the seconds of each stage; any thread may call it.

    `read`: seconds of reading so far, of each of the threads that read, on average. `host_bytes`: RAM that these
    threads took for their buffers."""

    def __init__(self) -> None:
        self.host_bytes = 0
        self._threads = self._most = 1  # that read now; that read in the pass
        self._seconds = dict.fromkeys(("total", *NAMES, "wait"), 0.0)
        self._before = 0.0  # reading before the pass
        self._started: float | None = None
        self._spans: list[tuple[str, Any, Any]] = []
        self._layers: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    @property
    def read(self) -> float:
        return self._seconds["read"]

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds / (self._threads if stage in ("read", "host_copy") else 1)

    def layer(self, wait: float, after: float) -> None:
        """A layer has passed."""
        self._layers.append((wait, after))

    def took(self, size: int) -> None:
        with self._lock:
            self.host_bytes += size

    def span(self, stage: str, begin: Any, end: Any) -> None:
        """Adds the time between two events, which may still lie ahead."""
        self._spans.append((stage, begin, end))

    def start(self, threads: int) -> None:
        """A pass begins, and `threads` read."""
        self._threads = self._most = threads
        self._before, self._started = self.read, time.perf_counter()

    def stop(self) -> None:
        """The pass has ended; harmless when it has not started, or has ended before."""
        if self._started is not None:
            self.add("total", time.perf_counter() - self._started)
            self._threads, self._started = 1, None

    def stages(self) -> Stages | None:
        """What was measured; None where no pass has ended."""
        while self._spans:
            stage, begin, end = self._spans.pop()
            end.synchronize()
            self.add(stage, begin.elapsed_time(end) / 1000)
        seconds = dict(self._seconds)
        if not seconds["total"]:
            return None
        seconds["read"] -= self._before
        seconds["compute"] = seconds["compute"] or seconds["total"] - seconds["wait"]
        return Stages(threads=self._most, layers=tuple(self._layers), **seconds)
