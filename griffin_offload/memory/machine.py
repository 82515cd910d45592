"""This machine's devices, memory and disk, as measured; and the default memory budget."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import OptionError
from ..files import free_disk
from . import cuda
from .measure import PROC, disk_bandwidth, resident_set

VARIABLE, ALL = "GRIFFIN_DEVICE", "all"
MARGIN = 0.05  # share of the free memory that is left to other processes
CGROUP = Path("/sys/fs/cgroup")


def best_device() -> str:
    """cuda, mps or cpu: what the variable GRIFFIN_DEVICE says, or else the best there is.

    Raises OptionError if it names one that is not there."""
    import torch

    if named := os.environ.get(VARIABLE):
        return check_device(named, f"{VARIABLE}: ")
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str, source: str = "") -> str:
    """The device. Raises OptionError if it is unknown or not there; `source`: who named it."""
    import torch

    device = device.lower()
    if device == ALL or ":" in device or "," in device:
        found = check_devices(device, source)
        if len(found) > 1:
            raise OptionError(f"{source}{device} is several devices, and this runs on one: give cpu, mps or cuda")
        return found[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device):
        have = ", ".join(name for name, is_there in there.items() if is_there)
        raise OptionError(f"{source}there is no device {device!r} here; there is: {have}")
    return device


def check_devices(devices: str, source: str = "") -> tuple[str, ...]:
    """The devices that a text names, the main one first: 'cpu', or several GPUs as 'cuda:0,cuda:1', or 'all' of them.

    Raises OptionError if one is unknown or not there; `source`: who named it."""
    import torch

    names = [name.strip() for name in devices.lower().split(",")]
    if names != [ALL] and len(names) == 1 and ":" not in names[0]:
        return (check_device(names[0], source),)
    return cards(names, torch.cuda.device_count() if torch.cuda.is_available() else 0, source)


def cards(names: Sequence[str], count: int, source: str = "") -> tuple[str, ...]:
    """Names of some of `count` GPUs, 'cuda:0', 'cuda:1' ..., or 'all' -> the names that they have here: 'cuda', which
    is the first, 'cuda:1' ...

    Raises OptionError for one that is no GPU, or is not there, or is named twice, and where the first is not the
    process's own first, to which everything goes that has no number."""
    known = [f"cuda:{index}" for index in range(count)]
    names = known if list(names) == [ALL] else names
    if others := [name for name in names if name.partition(":")[0] not in ("cuda", ALL)]:
        raise OptionError(f"{source}{others[0]!r} is no GPU: give cpu or mps alone, or GPUs such as cuda:0,cuda:1")
    if lost := [name for name in names if name not in known]:
        have = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda" if count else "no GPU"
        raise OptionError(f"{source}there is no GPU {lost[0]!r} here; there is: {have}")
    if not names:
        raise OptionError(f"{source}there is no GPU here that torch can use")
    if len(set(names)) < len(names):
        raise OptionError(f"{source}{','.join(names)} names a GPU twice")
    if names[0] != known[0]:
        numbers = ",".join(name.removeprefix("cuda:") for name in names)
        same = ",".join(known[: len(names)]) if len(names) > 1 else "cuda"
        raise OptionError(f"{source}the first GPU is cuda:0: set CUDA_VISIBLE_DEVICES={numbers} and give {same}")
    return ("cuda", *names[1:])


def devices_of(asked: str | None) -> tuple[str, ...]:
    """The devices of --device, the main one first; None: what the variable GRIFFIN_DEVICE says, or the best there is.

    Raises OptionError if one is not there."""
    if asked:
        return check_devices(asked)
    named = os.environ.get(VARIABLE)
    return check_devices(named, f"{VARIABLE}: ") if named else (best_device(),)


def container_limit() -> int | None:
    """The smallest memory limit of this process's control groups, in bytes, or None."""
    return min((limit for limit, _ in _groups()), default=None)


def available_memory() -> int:
    """Bytes of RAM that this process can still take: the machine's free memory, or what a container's limit leaves."""
    left = [max(0, limit - used) for limit, used in _groups()]
    return min([int(psutil.virtual_memory().available), *left])


def total_memory(device: str) -> int:
    """Bytes of memory that a device has, whoever holds them; on a CPU no more than the container may have."""
    if cuda.is_cuda(device):
        import torch

        return int(torch.cuda.mem_get_info(cuda.index(device))[1])
    limit = container_limit()
    return min(int(psutil.virtual_memory().total), limit if limit is not None else 2**63)


def device_budget(device: str) -> int:
    """The default of --device-memory, in bytes: what this process holds, and what is free less a margin.

    In RAM no more than a container's limit: what is held has pages of libraries, which its use of memory may not."""
    if cuda.is_cuda(device):
        return cuda.held(device) + int(cuda.free(device) * (1 - MARGIN))
    return min(resident_set() + int(available_memory() * (1 - MARGIN)), total_memory("cpu"))


def held_memory(device: str) -> int:
    """Bytes that this process holds on a device: all its RAM, or on CUDA context and tensors; 0 on MPS."""
    if cuda.is_cuda(device):
        return cuda.held(device)
    return resident_set() if device == "cpu" else 0


def how_known(device: str) -> str:
    """Whether `held_memory` is 'measured' or 'estimated'."""
    return "estimated" if cuda.is_cuda(device) and not cuda.context(device)[1] else "measured"


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, use without the page cache) of each control group up to the root, version 1 or 2; bytes."""
    with suppress(OSError):
        for line in (PROC / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                yield from _limits(CGROUP / "memory", path, ("limit_in_bytes", "usage_in_bytes"), "total_")
            elif controllers == "":
                yield from _limits(CGROUP, path, ("max", "current"), "")


def _limits(root: Path, path: str, files: tuple[str, str], prefix: str) -> Iterator[tuple[int, int]]:
    group, cache = root / path.lstrip("/"), (f"{prefix}inactive_file", f"{prefix}active_file")
    for place in (group, *group.parents):
        limit, usage = (place / f"memory.{name}" for name in files)
        with suppress(OSError, ValueError):
            bound = int(limit.read_text())  # "max" is no limit
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            if bound < psutil.virtual_memory().total:
                yield bound, int(usage.read_text()) - sum(int(stat.get(key, 0)) for key in cache)
        if place == root:
            return


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """This machine, in bytes and bytes per second."""

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
    """Measures this machine. `folder`: where models are kept; `sample`: a large file there, to read."""
    import torch

    (device, *_), gpus = devices_of(None), []
    held_memory(device)  # before anything else uses the device
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    speed = None
    with suppress(OSError):  # a full or read-only disk cannot be measured
        folder.mkdir(parents=True, exist_ok=True)
        speed = disk_bandwidth(folder, sample)
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
