"""Streams and events.

Work on the default stream is done at once. A copy on a side stream is done when somebody waits for it: whoever forgets
to sees old numbers. Every access to a storage is held against those of other streams: two that have no order, one of
them a write, are a fault. a.known[b] = n: the n-th work of stream b is done before what stream a does next."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

faults: list[str] = []  # what would be a race on a GPU
lock = threading.RLock()
_here = threading.local()
_numbers = iter(range(1, 1 << 40))


class Stream:
    """In the place of torch.cuda.Stream. `known`: by stream, how much of its work comes before this one's next."""

    def __init__(self, device: Any = None, priority: int = 0, default: bool = False) -> None:
        self.device = as_device(device)
        self.stream_id = 0 if default else next(_numbers)
        self.cuda_stream, self.default, self.number = self.stream_id, default, 0
        self.known: dict[Stream, int] = defaultdict(int)
        self.late: deque[tuple[int, Callable[[], None]]] = deque()  # work that is not done yet, with its number
        self.graph: Any = None  # that records what is submitted

    def __repr__(self) -> str:
        return "the default stream" if self.default else f"stream {self.stream_id}"

    def submit(self, name: str, reads: Iterable[int], writes: Iterable[int], late: Callable[[], None] | None) -> None:
        """Work that reads and writes storages; `late`: what it does, where that may wait. The caller holds the lock."""
        self.number += 1
        if late is None:
            self.finish(self.number - 1)
        else:
            self.late.append((self.number, late))
        for storage in (*reads, *writes):
            _access(self, name, storage, storage in writes)

    def finish(self, number: int) -> None:
        """Does all late work up to a number."""
        while self.late and self.late[0][0] <= number:
            self.late.popleft()[1]()

    def after(self, other: "Stream", number: int, known: dict["Stream", int]) -> None:
        """What this stream does next comes after so much of another one's work."""
        other.finish(number)
        for stream, count in {**known, other: number}.items():
            self.known[stream] = max(self.known[stream], count)

    def wait_event(self, event: "Event") -> None:
        with lock:
            if event.stream is not None:
                self.after(event.stream, event.number, event.known)

    def wait_stream(self, stream: "Stream") -> None:
        with lock:
            self.after(stream, stream.number, dict(stream.known))

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        from .tensor import no_waiting

        no_waiting("a stream's synchronize")
        with lock:
            host_waits(self, self.number, dict(self.known))

    def query(self) -> bool:
        return not self.late


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.stream: Stream | None = None
        self.number, self.known, self._timing, self._time = 0, dict[Stream, int](), enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        with lock:
            self.stream = stream or current_stream()
            self.number, self.known = self.stream.number, dict(self.stream.known)
            self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.stream is None or not self.stream.late or self.stream.late[0][0] > self.number

    def synchronize(self) -> None:
        with lock:
            if self.stream is not None:
                host_waits(self.stream, self.number, self.known)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds. Raises, as CUDA does, where an event was not recorded, or is not reached."""
        if not self._timing or not end._timing:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.stream is None or end.stream is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not self.query() or not end.query():
            raise RuntimeError("CUDA error: device not ready")
        return (end._time - self._time) * 1000


_default: dict[int, Stream] = {}
_all: "list[Stream]" = []
_accesses: dict[int, dict[Stream, list[int]]] = {}  # by storage and stream: numbers of the last read and write


def as_device(device: Any) -> torch.device:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    return found if found.index is not None else torch.device("cuda", current_device())


def current_device() -> int:
    return int(getattr(_here, "device", 0))


def set_device(device: Any) -> None:
    _here.device = device if isinstance(device, int) else torch.device(device).index or 0


@contextmanager
def device(wanted: Any) -> Iterator[None]:
    """In the place of torch.cuda.device."""
    before = current_device()
    set_device(wanted)
    try:
        yield
    finally:
        set_device(before)


def default_stream(device: Any = None) -> Stream:
    number = as_device(device).index
    with lock:
        if number not in _default:
            _default[number] = Stream(number, default=True)
        return _default[number]


def current_stream(device: Any = None) -> Stream:
    wanted = as_device(device)
    found: Stream | None = getattr(_here, "streams", {}).get(wanted.index)
    return found or default_stream(wanted)


@contextmanager
def stream(wanted: Stream | None) -> Iterator[None]:
    """In the place of torch.cuda.stream."""
    if wanted is None:
        yield
        return
    _here.streams = streams = getattr(_here, "streams", {})
    before, number = streams.get(wanted.device.index), wanted.device.index
    device_before = current_device()
    streams[number] = wanted
    set_device(number)
    try:
        yield
    finally:
        streams[number] = before
        set_device(device_before)


def host_waits(stream: Stream, number: int, known: dict[Stream, int]) -> None:
    """Whatever is submitted from now on comes after so much of a stream's work."""
    stream.finish(number)
    for each in {stream, *_default.values(), *known}:
        each.after(stream, number, known)


def synchronize(device: Any = None) -> None:
    """In the place of torch.cuda.synchronize."""
    with lock:
        for each in streams_in_use():
            if each.graph is not None:
                each.graph.refuse("torch.cuda.synchronize")
            host_waits(each, each.number, dict(each.known))


def streams_in_use() -> set[Stream]:
    used = {each for accesses in _accesses.values() for each in accesses}
    return used | set(_default.values())


def _access(stream: Stream, name: str, storage: int, writes: bool) -> None:
    accesses = _accesses.setdefault(storage, {})
    for other, (read, written) in accesses.items():
        last = max(read, written) if writes else written
        if other is not stream and last > stream.known[other]:
            verb = "writes" if writes else "reads"
            faults.append(f"{name} on {stream} {verb} what {other} is still at work on, without an order")
    last = accesses.setdefault(stream, [0, 0])
    last[writes] = stream.number


def freed(storage: int, own: Stream | None) -> None:
    """A storage's memory goes back to the allocator, for what its own stream does next; None: to nobody."""
    with lock:
        for other, (read, written) in _accesses.pop(storage, {}).items():
            if own and other is not own and max(read, written) > own.known[other]:
                faults.append(f"memory is given back while {other} is still at work on it")


def forget() -> None:
    """A new test begins."""
    with lock:
        faults.clear()
        _accesses.clear()
