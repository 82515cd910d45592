"""Keeps the hidden states of waiting forwards, in RAM as far as it is enough, then in a file.

A waiting state's storage is emptied, and filled with the same bytes before its forward goes on. Other references to it
see no difference.
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
from ..files import DISK_RESERVE, reason, write_at
from ..units import format_bytes


class Spill:
    """States by job number: `put` before a job waits, `take` before it goes on.

    `room`: bytes of RAM, for the first jobs. The file in `folder` has no name, so that it ends with the process. Raises
    GriffinError if the disk has no room for `on_disk` bytes."""

    def __init__(self, room: int, folder: Path, on_disk: int = 0) -> None:
        self._room, self._folder = room, folder
        self._stays: dict[int, bool] = {}
        self._embedded: dict[int, Callable[[], Tensor | None]] = {}
        self._left: dict[int, list[Callable[[], None]]] = {}  # by job: fills its states again
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
        """Announces the embedding's output, which many model types keep although only the first layer reads it."""
        self._embedded[job] = weakref.ref(states)

    def put(self, job: int, states: Tensor) -> None:
        """Empties the states (1, T, D), and the embedding's output."""
        storage, device = states.untyped_storage(), states.device.type
        if job not in self._stays:
            need = 2 * storage.nbytes()  # the embedding's output takes as much again
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
        """Saves and empties a tensor's storage; returns a function that fills it again."""
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
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix="griffin-", buffering=0)  # noqa: SIM115
            write_at(self._file.fileno(), _memory(storage), begin)
        except OSError as error:
            raise GriffinError(f"{self._folder} cannot hold the waiting hidden states: {reason(error)}") from None

    def _read(self, storage: Any, begin: int) -> None:
        assert self._file
        view, done = _memory(storage), 0
        while done < len(view):
            try:
                count = os.preadv(self._file.fileno(), [view[done:]], begin + done)
            except OSError as error:
                raise GriffinError(f"{self._folder} holds the hidden states no more: {reason(error)}") from None
            assert count, "what was written is there"
            done += count


def _bytes_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(storage: Any) -> memoryview:
    """The bytes of a storage in RAM. Not by numpy: torch could not resize it then."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
