"""The memory of this process over the time of a run, sampled by a thread of its own."""

import threading
import time
from dataclasses import dataclass

from .measure import resident_set

EVERY = 0.02  # seconds between two samples, at first
MOST = 1000  # samples; then every other one goes, and they are taken half as often


@dataclass(frozen=True)
class Sample:
    """`seconds` since the begin; bytes of RAM of the `process`, and on CUDA of torch's allocator on the `device`, or on
    several of them."""

    seconds: float
    process: int
    device: int | None = None


class Timeline:
    """Samples while its `with` block runs."""

    def __init__(self, device: str) -> None:
        self.samples: list[Sample] = []
        self._cuda, self._every = device == "cuda", EVERY
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="griffin-timeline", daemon=True)
        self._start = 0.0

    def __enter__(self) -> "Timeline":
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._take()
            if len(self.samples) > MOST:
                del self.samples[1::2]
                self._every *= 2
            self._ended.wait(self._every)

    def _take(self) -> None:
        device = None
        if self._cuda:
            import torch

            device = sum(torch.cuda.memory_reserved(card) for card in range(torch.cuda.device_count()))
        self.samples.append(Sample(time.perf_counter() - self._start, resident_set(), device))
