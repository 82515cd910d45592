"""Holds a child process to a memory limit, by a control group of the system."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...memory.machine import CGROUP
from ...memory.measure import PROC

ENTER = 'echo $$ > "$0" && exec "$@"'  # of sh: into the control group first, then the program


@dataclass(frozen=True)
class _Files:
    """The file names of one version of control groups: limit, limit with swap, peak, count of kills."""

    limit: str
    swap: str
    peak: str
    events: str


V1 = _Files("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
V2 = _Files("memory.max", "memory.swap.max", "memory.peak", "memory.events")


@dataclass(frozen=True)
class Group:
    """A memory control group of our own."""

    path: Path
    files: _Files

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in this group, from its first page on."""
        return ["sh", "-c", ENTER, str(self.path / "cgroup.procs"), *command]

    def peak(self) -> int | None:
        """Bytes, the page cache included; None where the kernel does not say."""
        with suppress(OSError, ValueError):
            return int((self.path / self.files.peak).read_text())
        return None

    def kills(self) -> int:
        """How many of its processes were killed for memory."""
        with suppress(OSError):
            for line in (self.path / self.files.events).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0


@contextmanager
def control_group(limit: int) -> Iterator[Group]:
    """A control group that holds its processes to `limit` bytes, without swap. Raises OSError without one."""
    group = _make_group(limit)
    try:
        yield group
    finally:
        for _ in range(50):  # a killed process leaves it a moment after it is gone
            with suppress(OSError):
                group.path.rmdir()
                break
            time.sleep(0.1)


def _make_group(limit: int) -> Group:
    reason = OSError("this system has no memory control groups")
    for parent, files in _parents():
        path = parent / f"griffin-bench-{os.getpid()}"
        try:
            path.mkdir()
        except OSError as error:
            reason = error
            continue
        try:
            if files is V2 and not (path / files.limit).exists():
                (parent / "cgroup.subtree_control").write_text("+memory")
            (path / files.limit).write_text(str(limit))
            with suppress(OSError):  # a kernel that does not count swap
                (path / files.swap).write_text(str(limit) if files is V1 else "0")
            group = Group(path, files)
            subprocess.run(group.enter(["true"]), check=True, capture_output=True)
            return group
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error if isinstance(error, OSError) else PermissionError(1, "no process may enter it")
            with suppress(OSError):
                path.rmdir()
    raise reason


def _parents() -> Iterator[tuple[Path, _Files]]:
    """Groups that ours may be made in: the one of this process, or else the one above it."""
    with suppress(OSError):
        for line in (PROC / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, files = (CGROUP / "memory", V1) if "memory" in controllers.split(",") else (CGROUP, V2)
            if files is V1 or not controllers:
                own = root / path.lstrip("/")
                yield own, files
                if own != root:
                    yield own.parent, files
