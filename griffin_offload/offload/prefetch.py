"""The reader thread: layer i + 1 is read while layer i computes, into a ring of buffers."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint.headers import TensorInfo
from ..checkpoint.reader import Reader
from ..memory.upload import Upload


@dataclass(frozen=True)
class Load:
    """What brings one layer: what is `read`, and where to; what is then copied, (from, to); and, with an upload, how
    many bytes of its slot's host buffer are then sent to the device."""

    read: Mapping[TensorInfo, Tensor]
    copies: Sequence[tuple[Tensor, Tensor]] = ()
    count: int = 0


class Prefetch:
    """Loads layers in order on one thread, never more than `ring` of them ahead of what was given back.

    Layers i and i + ring may share buffers, and a slot of the `upload`. A context manager: leaving it stops the thread,
    whatever happened.
    """

    def __init__(self, reader: Reader, layers: Sequence[Load], ring: int, upload: Upload | None = None) -> None:
        self._reader, self._layers, self._ring, self._upload = reader, layers, ring, upload
        self._free = threading.Semaphore(ring)
        self._stopping = False
        self._ready: list[Future[None]] = [Future() for _ in layers]
        self._thread = threading.Thread(target=self._run, name="griffin-reader", daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait(self, layer: int) -> None:
        """Return when a layer is in memory. Raises what the reader raised."""
        self._ready[layer].result()

    def release(self) -> None:
        """Give the buffers of the oldest layer back to the reader."""
        self._free.release()

    def close(self) -> None:
        """Stop after the layer that is being read, and wait for it: its buffers may then go."""
        self._stopping = True
        self._free.release()
        if self._thread.ident is not None:
            self._thread.join()
        self._layers = ()

    def _run(self) -> None:
        for index, (layer, ready) in enumerate(zip(self._layers, self._ready, strict=True)):
            self._free.acquire()
            if self._stopping:
                return
            try:
                if self._upload:
                    self._upload.begin(index % self._ring)
                self._reader.read(layer.read)
                for source, target in layer.copies:
                    target.copy_(source)
                if self._upload:
                    self._upload.send(index % self._ring, layer.count)
            except BaseException as error:  # the computing thread raises it
                ready.set_exception(error)
                return
            ready.set_result(None)
