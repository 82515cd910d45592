"""The side tensors (scales, zero points ...) of a quantized weight: read once, in however many parts it is read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from torch import Tensor

from ..headers import Packed, TensorInfo
from .decode import units


@dataclass
class _Held:
    """`left`: units of the weight that were not decoded yet."""

    left: int
    lock: Lock = field(default_factory=Lock)
    tensors: dict[str, Tensor] | None = None


class Sides:
    """Holds a weight's side tensors from its first part to its last. Any number of threads may ask."""

    def __init__(self, read: Callable[[TensorInfo], Tensor]) -> None:
        self._read, self._lock = read, Lock()
        self._held: dict[tuple[Path, int], _Held] = {}

    @contextmanager
    def of(self, packed: Packed) -> Iterator[Mapping[str, Tensor]]:
        """Those of a weight, by role, for as long as a part of it is decoded."""
        key = (packed.main.file, packed.main.begin)
        with self._lock:
            held = self._held.setdefault(key, _Held(units(packed)))
        with held.lock:
            if held.tensors is None:
                held.tensors = {role: self._read(side) for role, side in packed.sides}
        try:
            yield held.tensors
        finally:
            with self._lock:
                held.left -= packed.last - packed.first
                if held.left <= 0:
                    self._held.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
