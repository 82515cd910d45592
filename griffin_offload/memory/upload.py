"""Copies layers from the host to a GPU.

A ring of slots, each a pinned host buffer and a device buffer of the same layout. The reader thread fills a host buffer
and sends it in one copy on its own stream; the computing stream waits for it by an event. The only thread that waits is
the reader, before it overwrites a host buffer. On devices other than CUDA the copies are plain.
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
        """Waits until the host buffer has been copied and can be overwritten."""
        if self._stream:
            self._arrived[slot].synchronize()

    def send(self, slot: int, count: int) -> None:
        """Copies the first `count` bytes to the device buffer, after its last layer has left."""
        source, target = self.host[slot].memory[:count], self.there[slot].memory[:count]
        if not self._stream:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._left[slot])
            target.copy_(source, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def arrive(self, slot: int) -> None:
        """Everything computed from now on waits for the layer's copy."""
        if self._stream:
            torch.cuda.current_stream().wait_event(self._arrived[slot])

    def leave(self, slot: int) -> None:
        """Everything computed so far may read the device buffer; nothing later does."""
        if self._stream:
            self._left[slot].record()
