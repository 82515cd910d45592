"""Layers that several threads send through pinned pieces to the slots of a device."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin_offload.memory.arena import Arena
from griffin_offload.memory.stage_clock import StageClock
from griffin_offload.memory.upload import Ring, Upload
from griffin_offload.offload.prefetch import Load, Prefetch

LAYERS, SLOTS, PIECES, THREADS = 20, 2, 8, 4


class SlowStream:
    """A stream as CUDA's, on a thread: what is submitted runs later, in order; an event is reached when all that was
    submitted before it has run."""

    def __init__(self, delay: float) -> None:
        self._delay, self._work = delay, queue.SimpleQueue[Callable[[], Any]]()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> None:
        self._work.put(work)

    def wait_event(self, event: "SlowEvent") -> None:
        self.submit(event.reached.wait)  # as it was recorded last, when this is called

    def wait_stream(self, stream: "SlowStream") -> None:
        event = SlowEvent()
        event.record(stream)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = SlowEvent()
        event.record(self)
        event.synchronize()

    def _run(self) -> None:
        while True:
            self._work.get()()
            time.sleep(self._delay)


class SlowEvent:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.reached.set()  # never recorded: nothing to wait for

    def record(self, stream: SlowStream) -> None:
        self.reached = threading.Event()
        stream.submit(self.reached.set)

    def synchronize(self) -> None:
        self.reached.wait()

    def elapsed_time(self, end: "SlowEvent") -> float:
        return 1.0


class SlowUpload(Upload):
    """On the CPU, with streams that run late."""

    def __init__(self, *inputs: Any, copying: float, computing: float) -> None:
        self.computing = SlowStream(computing)
        super().__init__(*inputs)
        self._streams = dict.fromkeys(self._streams, SlowStream(copying))

    def target(self, tensor: Tensor) -> Any:
        """What `send` can copy to: the copy is made by the stream."""
        (stream,) = self._streams.values()

        class Target:
            def copy_(self, source: Tensor, non_blocking: bool) -> None:
                stream.submit(lambda: tensor.copy_(source))

        return Target()

    def _computing(self, device: torch.device) -> SlowStream:
        return self.computing

    def _event(self) -> SlowEvent:
        return SlowEvent()


def seen_by_slow_streams(piece: int, copying: float, computing: float) -> list[list[int]]:
    """As `seen_by_each_layer`, with seconds that streams stay behind after each step."""
    slots, seen = [Arena(PIECES * piece) for _ in range(SLOTS)], list[list[int]]()
    ring = Ring(THREADS, THREADS + 1, piece)
    upload = SlowUpload(slots, ring, StageClock(), copying=copying, computing=computing)

    def bring(layer: int, number: int) -> None:
        here = upload.take()
        source = here.memory.take((piece,), torch.uint8).fill_(layer + 1)
        target = upload.target(slots[layer % SLOTS].memory[number * piece : (number + 1) * piece])
        here.sent = upload.send([(source, target)], layer % SLOTS)
        upload.give(here)

    def look(layer: int) -> None:
        memory = slots[layer % SLOTS].memory
        seen.append([int(memory.min()), int(memory.max())])

    loads = [
        Load([partial(bring, layer, number) for number in range(PIECES)], partial(upload.complete, layer % SLOTS))
        for layer in range(LAYERS)
    ]
    with Prefetch(loads, SLOTS, THREADS) as prefetch:
        for layer in range(LAYERS):
            prefetch.wait(layer)
            upload.arrive(layer % SLOTS)
            upload.computing.submit(partial(look, layer))
            upload.leave(layer % SLOTS)
            prefetch.release()
    upload.close()
    upload.computing.synchronize()
    return seen


def seen_by_each_layer(device: str, piece: int, side: int) -> tuple[list[list[int]], StageClock]:
    """The smallest and largest byte that each layer has in its slot: layer i is all i + 1, if nothing is overwritten or
    read too early.

    The device computes long products (`side`) on each layer, while threads fill the next ones: more pieces than the
    ring has, more layers than slots."""
    clock = StageClock()
    slots = [Arena(PIECES * piece, device) for _ in range(SLOTS)]
    upload, seen = Upload(slots, Ring(THREADS, THREADS + 1, piece), clock), []

    def bring(layer: int, number: int) -> None:
        here = upload.take()
        try:
            source = here.memory.take((piece,), torch.uint8)
            source.fill_(layer + 1)
            target = slots[layer % SLOTS].memory[number * piece : (number + 1) * piece]
            here.sent = upload.send([(source, target)], layer % SLOTS)
        finally:
            upload.give(here)

    loads = [
        Load([partial(bring, layer, number) for number in range(PIECES)], partial(upload.complete, layer % SLOTS))
        for layer in range(LAYERS)
    ]
    heavy = torch.randn(side, side, device=device)
    clock.start(THREADS)
    with Prefetch(loads, SLOTS, THREADS) as prefetch:
        for layer in range(LAYERS):
            prefetch.wait(layer)
            upload.arrive(layer % SLOTS)
            heavy = (heavy @ heavy).clamp_(-1, 1)
            memory = slots[layer % SLOTS].memory
            seen.append(torch.stack([memory.min(), memory.max()]))
            upload.leave(layer % SLOTS)
            prefetch.release()
    upload.close()
    clock.stop()
    return [pair.tolist() for pair in seen], clock
