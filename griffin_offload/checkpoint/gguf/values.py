"""The values of a GGUF header by key, each of the type that it is meant to be of: a file may hold any other."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ...errors import CheckpointError
from ...foreign import NAME, shown

MOST = 2**32 - 1  # of a count: uint32 is what they are written in


class Values(dict[str, Any]):
    """Values by key. `name`: of the file, for errors. Each method raises CheckpointError for a value of another type.

    A key that is not there gives None, or `default`."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        super().__init__(values)
        self.name = name

    def text(self, key: str, default: str = "") -> str:
        value = self.get(key, default)
        return value if isinstance(value, str) else self._refuse(key, "a text")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        return bool(value) if type(value) in (bool, int) else self._refuse(key, "true or false")

    def whole(self, key: str, least: int = 0, most: int = MOST) -> int | None:
        value = self.get(key)
        fine = value is None or (type(value) is int and least <= value <= most)
        return value if fine else self._refuse(key, f"a whole number, {least} to {most}")

    def number(self, key: str) -> float | None:
        """A finite number, 0 or more; a whole one stays one."""
        value: float | None = self.get(key)
        if value is None or (type(value) in (int, float) and 0 <= value < math.inf):
            return value
        return self._refuse(key, "a number, 0 or more")

    def of(self, prefix: str) -> "Values":
        """The values whose keys begin with `prefix`, without it."""
        return Values({key.removeprefix(prefix): v for key, v in self.items() if key.startswith(prefix)}, self.name)

    def _refuse(self, key: str, meant: str) -> NoReturn:
        value = shown(repr(self[key]), NAME)
        raise CheckpointError(
            f"{self.name}: its header says {shown(key, NAME)} {value}; it should be {meant}: fetch it again"
        )
