"""Where the hidden states of many forwards wait while others pass a layer: in RAM as far as it goes, else in a file.

A state's storage is emptied while it waits in the file, and filled with the same bytes before its forward goes on:
whatever else of that forward looks at it finds it as it was.
"""

import ctypes
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import GriffinError
from ..files import DISK_RESERVE, reason
from ..units import format_bytes


class Spill:
    """The states of jobs, by number: `put` before a job waits, `take` before it goes on.

    `room`: bytes of RAM for those of the first jobs; on a GPU they are copied there. The file, in `folder`, has no
    name, so that it is gone with the process. Raises GriffinError where the disk does not take `on_disk` bytes."""

    def __init__(self, room: int, folder: Path, on_disk: int = 0) -> None:
        self._room, self._folder = room, folder
        self._stays: dict[int, bool] = {}
        self._embedded: dict[int, Callable[[], Tensor | None]] = {}
        self._left: dict[int, list[Callable[[], None]]] = {}  # by job: what brings its states back
        self._places: dict[tuple[int, int], tuple[int, int]] = {}  # of job and slot: begin and bytes
        self._versions: dict[int, int] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise GriffinError(f"{folder} cannot hold the waiting hidden states: {reason(error)}") from None
        if on_disk and free < (need := on_disk + DISK_RESERVE):
            raise GriffinError(
                f"the hidden states need {format_bytes(need)} in {folder}, which has {format_bytes(free)} "
                "free: ask for fewer samples or tokens, or give more memory"
            )

    @property
    def on_disk(self) -> int:
        """Bytes of the file so far."""
        return self._end

    def embedded(self, job: int, states: Tensor) -> None:
        """What a job's embedding put out: many types hold on to it, though only the first layer reads it."""
        self._embedded[job] = weakref.ref(states)

    def put(self, job: int, states: Tensor) -> None:
        """The states (1, T, D) may go, and what the embedding put out."""
        storage, device = states.untyped_storage(), states.device.type
        if job not in self._stays:
            need = 2 * storage.nbytes()  # as many again when the embedding's are held besides
            self._stays[job] = need <= self._room
            self._room -= need if self._stays[job] else 0
        if self._stays[job] and device == "cpu":
            return
        left = self._left[job] = []
        left.append(self._leave(job, 0, states))
        first = self._embedded.get(job, lambda: None)()
        if first is not None and first.untyped_storage().nbytes():  # empty: it was the states themselves
            left.append(self._leave(job, 1, first))

    def take(self, job: int) -> None:
        for bring_back in self._left.pop(job, ()):
            bring_back()

    def close(self) -> None:
        self._left.clear()
        if self._file:
            self._file.close()
            self._file = None

    def _leave(self, job: int, slot: int, tensor: Tensor) -> Callable[[], None]:
        """Empties a tensor's storage; returns what fills it again."""
        storage = tensor.untyped_storage()
        size, there = storage.nbytes(), storage.device.type != "cpu"
        if self._stays[job]:
            copy = _bytes_of(storage).cpu()

            def bring_back() -> None:
                storage.resize_(size)
                _bytes_of(storage).copy_(copy)
        else:
            begin, room = self._places.get((job, slot), (0, -1))
            if room < size:
                begin, self._end = self._end, self._end + size
                self._places[job, slot] = begin, size
            if slot == 0 or room < size or self._versions.get(job) != tensor._version:  # else it is there already
                self._write(storage.cpu(), begin)
            if slot:
                self._versions[job] = tensor._version

            def bring_back() -> None:
                storage.resize_(size)
                target = torch.UntypedStorage(size) if there else storage
                self._read(target, begin)
                if there:
                    storage.copy_(target, False)

        storage.resize_(0)
        return bring_back

    def _write(self, storage: Any, begin: int) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="griffin-", buffering=0)  # noqa: SIM115
        view, done = _memory(storage), 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], begin + done)
        except OSError as error:
            raise GriffinError(f"{self._folder} cannot hold the waiting hidden states: {reason(error)}") from None

    def _read(self, storage: Any, begin: int) -> None:
        assert self._file
        view, done = _memory(storage), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], begin + done)
            assert count, "what was written is there"
            done += count


def _bytes_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(storage: Any) -> memoryview:
    """A storage in RAM. Not by numpy, after which torch resizes it no more."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
