"""Makes the n-th call of the operating system fail, as a full disk, a broken one or a process without open files would.

Only calls that Griffin's own code makes count, those that it makes through pathlib, shutil and the like included."""

import builtins
import errno
import fcntl
import io
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ERRNOS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EMFILE", "EACCES")}
OURS = tuple(str(Path(__file__).parents[2] / name) + os.sep for name in ("griffin_offload", "cli"))
THROUGH = ("/pathlib.py", "/shutil.py", "/tempfile.py", "/contextlib.py", "/injection.py", "<frozen os>")
CALLS = """open read pread preadv pwrite write ftruncate rename replace link unlink rmdir mkdir fsync listdir scandir
    chmod""".split()  # noqa: SIM905
CLEANING = (
    "unlink",
    "rmdir",
    "listdir",
    "scandir",
)  # where these fail, what they would remove stays until the next run


class Faults:
    """A context manager: the call number `at` (from 1; 0: none) of its block fails with `number`. `everything`: and
    all that write after it, as on a disk that is and stays full. `calls`: how many there were; `hit`: the one that
    failed, by its name."""

    def __init__(self, at: int = 0, number: int = errno.EIO, everything: bool = False) -> None:
        self.at, self.error = at, errno.errorcode[number]
        self._number, self._everything = number, everything
        self.calls, self.hit, self.names = 0, "", Counter[str]()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Faults":
        for module, names in ((os, CALLS), (fcntl, ["flock"])):
            for name in names:
                self._replace(module, name, self._wrap(name, getattr(module, name)))
        opened = self._opens(io.open)
        self._replace(io, "open", opened)
        self._replace(builtins, "open", opened)
        return self

    def __exit__(self, *exc: object) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)

    def tick(self, name: str) -> None:
        """Counts a call. Raises OSError where it is the one."""
        self.calls += 1
        self.names[name] += 1
        again = self._everything and self.hit and name in ("write", "pwrite", "mkdir", "ftruncate", "fsync")
        if self.calls == self.at or again:
            self.hit = self.hit or name
            raise OSError(self._number, os.strerror(self._number))

    def _replace(self, module: Any, name: str, value: Any) -> None:
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_ours(sys._getframe(1)):
                self.tick(name)
            return function(*args, **kwargs)

        return call

    def _opens(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if not is_ours(sys._getframe(1)):
                return real(file, mode, buffering, *args, **kwargs)
            self.tick("open")
            names = ("encoding", "errors", "newline", "closefd", "opener")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            plain = mode.replace("b", "").replace("t", "")
            raw = counted(self.tick)(file, plain, given.pop("closefd", True), given.pop("opener", None))
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffered: Any = kind(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, **given)

        return call


def counted(tick: Callable[[str], None]) -> type[io.FileIO]:
    """Files whose reads and writes count."""

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            tick("write")
            return super().write(data)

        def readinto(self, buffer: Any) -> int:
            tick("read")
            return super().readinto(buffer)

        def readall(self) -> bytes:
            tick("read")
            return super().readall()

        def truncate(self, size: int | None = None) -> int:
            tick("ftruncate")
            return super().truncate(size)

    return Counted


def is_ours(frame: FrameType | None) -> bool:
    """Whether a call comes from Griffin's code."""
    while frame and frame.f_code.co_filename.endswith(THROUGH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(OURS)
