"""Copies layers from the host to a GPU.

A layer passes in pieces. A reading thread takes a free pinned piece, fills it and sends it on the copy stream; other
threads fill others meanwhile, so that reading, copies in RAM and the bus work at the same time. Each layer goes to a
slot of device memory; the computing stream waits for it by an event.

Pieces go with the pass; torch keeps their pinned memory for the next one.

A pinned piece is filled again only after the event of its copy. A slot is written only after its last layer has left.
On devices other than CUDA the copies are plain, and `Plain` is in the place of streams and events.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..units import MIB
from .arena import Arena
from .stage_clock import StageClock

PIECE = 32 * MIB  # bytes of a pinned piece: large enough for the disk and the bus; torch rounds up to a power of 2
IN_FLIGHT = 4  # pieces more than threads: they are on the bus while every thread fills one
MOST_THREADS = 12  # measured: with 12 a page cache gives as much as the bus takes
DECODERS = 4  # threads where weights are converted: each has buffers, and torch's operators use more threads themselves


@dataclass(frozen=True)
class Ring:
    """How a layer comes to a device: `threads` that read, and `pieces` of pinned memory of `piece` bytes."""

    threads: int
    pieces: int
    piece: int

    @property
    def bytes(self) -> int:
        return self.pieces * self.piece


def ring_for(device: str, converts: bool = False) -> Ring:
    """The ring for a device on this machine. `converts`: weights have another dtype or form on disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(MOST_THREADS, max(cores - 1, min(cores, 2)))  # two even on two cores: one reads, one copies
    if converts:
        threads = min(DECODERS, threads)
    if device == "mps":  # copies from several threads were never tried there
        threads = 1
    return Ring(threads, threads + IN_FLIGHT, PIECE)


class Plain:
    """In the place of a stream or an event where copies are plain: it only knows the time."""

    _time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "Plain") -> float:
        """Milliseconds."""
        return (end._time - self._time) * 1000

    def synchronize(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


class HostPiece:
    """Memory that is pinned, if the system lets it be, and `sent`: the event after which it can be filled again."""

    def __init__(self, size: int, pinned: bool, sent: Any) -> None:
        try:
            self.memory = Arena(size, pinned=pinned)
        except RuntimeError:  # no more memory can be locked: copies are slower, and still guarded by events
            self.memory = Arena(size)
        self.sent = sent


class Upload:
    """The ring of pinned pieces that fills `slots`, buffers of the device, one layer in each.

    Reading threads call `take`, `send` and `give`, the last of a layer `complete`; the computing thread `arrive`,
    `leave` and, at the end, `close`."""

    def __init__(self, slots: Sequence[Arena], ring: Ring, clock: StageClock) -> None:
        self._cuda, self._ring, self._clock = slots[0].memory.is_cuda, ring, clock
        self._devices = [slot.memory.device for slot in slots]
        self._streams: dict[Any, Any] = {d: torch.cuda.Stream(d) if self._cuda else Plain() for d in self._devices}
        for device, stream in self._streams.items():
            stream.wait_stream(self._computing(device))  # the slots may be in use by what was computed before
        self._arrived, self._left = ([self._event() for _ in slots] for _ in range(2))
        self._began = [self._event() for _ in slots]
        self._enqueue = Lock()  # the copies of a piece lie together on the stream, between the events that time them
        self._free: SimpleQueue[HostPiece | None] = SimpleQueue()
        for _ in range(ring.pieces):
            self._free.put(None)  # pinned by the thread that takes it first: pinning is slow

    def take(self) -> HostPiece:
        """A pinned piece that can be filled. Waits for one."""
        if (piece := self._free.get()) is None:
            piece = HostPiece(self._ring.piece, self._cuda, self._event())
            self._clock.took(self._ring.piece)
        piece.sent.synchronize()
        piece.memory.rewind()
        return piece

    def send(self, copies: Sequence[tuple[Tensor, Tensor]], slot: int) -> Any:
        """Copies pinned tensors to tensors of a slot, (from, to), after the slot's last layer has left. Returns the
        event after which the pinned ones may change."""
        began, sent = self._event(), self._event()
        stream = self._streams[self._devices[slot]]
        with self._enqueue, torch.cuda.stream(stream) if self._cuda else nullcontext():
            stream.wait_event(self._left[slot])
            began.record(stream)
            for source, target in copies:
                target.copy_(source, non_blocking=self._cuda)
            sent.record(stream)
        self._clock.span("bus", began, sent)
        return sent

    def give(self, piece: HostPiece) -> None:
        """Back to the ring: filled again once what was sent of it has arrived."""
        self._free.put(piece)

    def complete(self, slot: int) -> None:
        """All of a layer has been sent."""
        self._arrived[slot].record(self._streams[self._devices[slot]])

    def arrive(self, slot: int) -> None:
        """Everything computed from now on waits for the layer's copies."""
        computing = self._computing(self._devices[slot])
        computing.wait_event(self._arrived[slot])
        self._began[slot] = self._event()
        self._began[slot].record(computing)

    def leave(self, slot: int) -> None:
        """Everything computed so far may read the slot; nothing later does."""
        self._left[slot] = self._event()
        self._left[slot].record(self._computing(self._devices[slot]))
        self._clock.span("compute", self._began[slot], self._left[slot])

    def close(self) -> None:
        """Waits for copies on their way: what they read and write may then go."""
        for stream in self._streams.values():
            stream.synchronize()

    def _computing(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device) if self._cuda else Plain()

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True, blocking=True) if self._cuda else Plain()
