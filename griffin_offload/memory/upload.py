"""Layers on their way from the host to a device that the reader cannot write to: a GPU.

A ring of slots, each a host buffer (pinned, so that the copy engine reads it by itself) and a device buffer of the same
layout. The reader thread fills a host buffer and sends it, in one flat copy on a stream of its own; the computing
stream waits for it by an event. No thread waits for the device, but the reader before it writes over a host buffer.
Elsewhere than on CUDA the copies are plain ones: the same lines, in order.
"""

from typing import Any

import torch

from .arena import Arena


class Upload:
    """`slots` pairs of buffers of `size` bytes. One thread calls `begin` and `send`, another `arrive` and `leave`."""

    def __init__(self, size: int, slots: int, device: str) -> None:
        self.host = [Arena(size, pinned=device == "cuda") for _ in range(slots)]
        self.there = [Arena(size, device) for _ in range(slots)]
        self._stream: Any = torch.cuda.Stream() if device == "cuda" else None
        self._arrived: list[Any] = [torch.cuda.Event() if self._stream else None for _ in range(slots)]
        self._left: list[Any] = [torch.cuda.Event() if self._stream else None for _ in range(slots)]

    def begin(self, slot: int) -> None:
        """Before a host buffer is written: what it held has been copied."""
        if self._stream:
            self._arrived[slot].synchronize()

    def send(self, slot: int, count: int) -> None:
        """Copy the first `count` bytes of a host buffer to the device, once the last layer there has left."""
        source, target = self.host[slot].memory[:count], self.there[slot].memory[:count]
        if not self._stream:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left[slot])
            target.copy_(source, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def arrive(self, slot: int) -> None:
        """What is computed from here on finds the layer on the device."""
        if self._stream:
            torch.cuda.current_stream().wait_event(self._arrived[slot])

    def leave(self, slot: int) -> None:
        """What was computed up to here is the last that reads the device buffer."""
        if self._stream:
            self._left[slot].record()
