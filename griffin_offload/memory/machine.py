"""What memory there is, what of it was used, and how fast it and the disk are: measured, never assumed."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import OptionError
from ..files import free_disk
from .measure import PROC, disk_bandwidth, resident_set

MARGIN = 0.05  # of what is free: left to the rest of the machine
CGROUP = Path("/sys/fs/cgroup")


def best_device() -> str:
    """cuda, mps or cpu: the best there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> str:
    """Raises OptionError for a device that is unknown or not there."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device):
        have = ", ".join(name for name, is_there in there.items() if is_there)
        raise OptionError(f"there is no device {device!r} here; there is: {have}")
    return device


def container_limit() -> int | None:
    """The smallest memory limit of the control groups that this process is in, bytes; None if there is none."""
    return min((limit for limit, _ in _groups()), default=None)


def available_memory() -> int:
    """RAM that a process here can still take, bytes: the machine's, or what is left of a container's limit."""
    left = [max(0, limit - used) for limit, used in _groups()]
    return min([int(psutil.virtual_memory().available), *left])


def device_budget(device: str) -> int:
    """The default for --device-memory: what is free, less a margin. On the CPU it counts the whole process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0] * (1 - MARGIN))
    return resident_set() + int(available_memory() * (1 - MARGIN))


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, used without the page cache) of each control group up to the root; version 1 and 2."""
    with suppress(OSError):
        for line in (PROC / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                yield from _limits(
                    CGROUP / "memory",
                    path,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    ("total_inactive_file", "total_active_file"),
                )
            elif controllers == "":
                yield from _limits(CGROUP, path, "memory.max", "memory.current", ("inactive_file", "active_file"))


def _limits(root: Path, path: str, limit: str, usage: str, cache: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    group = root / path.lstrip("/")
    for place in (group, *group.parents):
        with suppress(OSError, ValueError):
            bound = int((place / limit).read_text())  # "max" is no limit
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            if bound < psutil.virtual_memory().total:
                yield bound, int((place / usage).read_text()) - sum(int(stat.get(key, 0)) for key in cache)
        if place == root:
            return


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """This machine; bytes, and bytes a second."""

    ram_total: int
    ram_available: int
    container_limit: int | None
    gpus: tuple[Gpu, ...]
    disk_free: int
    disk_read_bandwidth: float | None
    device: str
    budget: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def machine(folder: Path, sample: Path | None = None) -> Machine:
    """Measure this machine; `folder` is where models are kept, `sample` a large file there to read."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    speed = None
    with suppress(OSError):  # a full or read-only disk has no speed to tell
        folder.mkdir(parents=True, exist_ok=True)
        speed = disk_bandwidth(folder, sample)
    device = best_device()
    return Machine(
        ram_total=int(psutil.virtual_memory().total),
        ram_available=available_memory(),
        container_limit=container_limit(),
        gpus=tuple(gpus),
        disk_free=free_disk(folder),
        disk_read_bandwidth=speed,
        device=device,
        budget=device_budget(device),
    )
