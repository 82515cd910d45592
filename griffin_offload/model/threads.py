"""How many threads a forward on the CPU gets: as many as there are cores that other programs leave free.

torch's threads (OpenMP's) wait for each other after every product, and they spin while they wait. When one of them has
lost its core to another program, a product of microseconds takes as long as that program may keep the core, which is
milliseconds (docs/memory.md). Of the times that the system counts, none has to be tried out: those of the cores, less
this process's own.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch

WINDOW = 0.3  # seconds between two looks; the system counts in hundredths of one
TRIAL = 30.0  # seconds after which it is tried again whether programs of low priority give way
SLACK = 0.6  # others that use less than 0.4 of a core use none
LONG = 2**29  # multiply-adds of a product that outlasts another program's turn: its threads lose little by waiting


@dataclass(frozen=True)
class CoreTimes:
    """A moment, and seconds up to then: of all cores that this process may use `idle` and (Linux, macOS) `nice`, of
    programs of low priority; `own`: of this process's threads."""

    moment: float
    cores: int
    idle: float
    nice: float
    own: float

    @classmethod
    def now(cls) -> "CoreTimes":
        times: list[Any] = []
        with suppress(OSError):  # some sandboxes hide them
            times = allowed(psutil.cpu_times(percpu=True))
        return cls(
            moment=time.perf_counter(),
            cores=len(times) or os.cpu_count() or 1,
            idle=sum(each.idle + getattr(each, "iowait", 0.0) for each in times),
            nice=sum(getattr(each, "nice", 0.0) for each in times),
            own=time.process_time(),
        )


def allowed(times: list[Any]) -> list[Any]:
    """Those of the cores that this process may run on, where the system tells."""
    if not hasattr(os, "sched_getaffinity"):
        return times
    cores = os.sched_getaffinity(0)
    return [times[core] for core in cores] if max(cores) < len(times) else times


def taken(before: CoreTimes, now: CoreTimes) -> tuple[float, float]:
    """How many cores other programs used between two looks, on average, and how many of these those of low priority; 0
    where the system keeps no times."""
    seconds, idle = now.moment - before.moment, now.idle - before.idle
    if now.cores != before.cores or (now.idle == 0 and now.nice == 0):
        return 0.0, 0.0
    others = max(0.0, now.cores - (idle + now.own - before.own) / seconds)
    return others, min(others, (now.nice - before.nice) / seconds)


def fitting(most: int, cores: int, others: float) -> int:
    """Threads, at most `most`, where others use that many of the cores."""
    return max(1, min(most, max(most, cores) - int(others + SLACK)))


class Threads:
    """Sets torch's number of threads for each forward; afterwards it is what the program had set.

    `used`: how many forwards of resident layers ran on each number, as `decode_by_own_kernels` counts them."""

    def __init__(self, largest: int) -> None:
        """`largest`: weights of a layer's largest matrix."""
        self.adapts = True
        self.used: Counter[int] = Counter()
        self._largest = largest
        self._before: int | None = None  # what the program had set, while it is not that
        self._kept = 0
        self._times, self._others, self._trial = CoreTimes.now(), 0.0, 0.0

    def fit(self, rows: int) -> None:
        """Before work on that many tokens: as many threads as fit now, until `back`."""
        if not self.adapts:
            return
        most = self._before or torch.get_num_threads()
        number = most if most == 1 or rows * self._largest >= LONG else fitting(most, self._times.cores, self._look())
        if number != torch.get_num_threads():
            self._before = most
            torch.set_num_threads(number)

    def back(self) -> None:
        """As many threads as before, unless they are `kept`."""
        if self._before is not None and not self._kept:
            torch.set_num_threads(self._before)
            self._before = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While an answer is made: the last number that fitted is kept for what runs between forwards, as sampling."""
        self._kept += 1
        try:
            yield
        finally:
            self._kept -= 1
            self.back()

    @contextmanager
    def fitted(self, rows: int) -> Iterator[None]:
        """Work on that many tokens, with as many threads as fit."""
        self.fit(rows)
        try:
            yield
        finally:
            self.back()

    def _look(self) -> float:
        """How many cores others use. Those of low priority use what is free, and may or may not give it up: that shows
        only while the threads are there."""
        if time.perf_counter() - self._times.moment >= WINDOW:
            before, self._times = self._times, CoreTimes.now()
            self._others, low = taken(before, self._times)
            if self._times.moment >= self._trial:
                self._others -= low
                self._trial = self._times.moment + TRIAL
        return self._others
