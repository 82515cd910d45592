"""Where workers run: one on each GPU, or several on the CPU, which share its cores and its memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import OptionError
from ..options import Placement
from ..units import format_bytes, parse_bytes

CUDA_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """Where one worker runs. `variables`: of its environment, set before torch is imported there; `told`: in words;
    `workers`: how many there are on this machine, which share a tier in RAM."""

    placement: Placement
    told: str
    variables: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1


def places(placement: Placement, workers: int | None) -> list[Place]:
    """A place for each of `workers`; None: for each GPU, or one on another device. Several GPUs that are named are one
    place, whose model has its layers on all of them.

    Raises OptionError for a device that is not there, and for more workers than GPUs, or than there is memory for."""
    from ..memory.machine import devices_of

    device, *others = devices_of(placement.device)
    if others:
        named = ",".join(("cuda:0", *others))
        if (workers or 1) > 1:
            raise OptionError(
                f"--workers {workers}: {named} hold one model together; leave --workers out, or give --device cuda, by "
                "which every worker has a GPU of its own"
            )
        return [Place(replace(placement, device=named), f"GPUs {named}")]
    if device == "cuda":
        gpus = visible_gpus()
        if workers is not None and workers > len(gpus):
            raise OptionError(f"--workers {workers}: there are {len(gpus)} GPUs, and a worker has one of its own")
        chosen = gpus[:workers] if workers else gpus
        on_gpu = replace(placement, device="cuda")
        return [Place(on_gpu, f"GPU {gpu}", {CUDA_DEVICES: gpu}, len(chosen)) for gpu in chosen]
    if device != "cpu" and (workers or 1) > 1:
        raise OptionError(f"--workers {workers}: {device} is one device; several workers need the CPU or several GPUs")
    return cpu_places(replace(placement, device=device), workers or 1)


def visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs of this process."""
    import torch

    named = [name.strip() for name in os.environ.get(CUDA_DEVICES, "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(index) for index in range(count)]


def cpu_places(placement: Placement, workers: int) -> list[Place]:
    """Each with its share of the threads, and of the memory where none was asked for: of what is left beside the tier
    that they share, where one was asked for."""
    if workers == 1:
        return [Place(placement, placement.device or "cpu")]
    import torch

    from ..memory.machine import available_memory
    from ..memory.measure import resident_set

    least, free = resident_set(), available_memory()  # a worker has the libraries of this process, before any weight
    if workers * least > free:
        raise OptionError(
            f"--workers {workers}: there is room for {max(1, free // least)} at most, in {format_bytes(free)} of free "
            f"memory, since Python and its libraries alone take {format_bytes(least)} in each"
        )
    threads = placement.threads or max(1, torch.get_num_threads() // workers)
    memory = placement.device_memory
    if memory is None:
        memory = max(workers, free * 9 // 10 - parse_bytes(placement.host_memory or 0)) // workers
    share = replace(placement, threads=threads, device_memory=memory)
    told = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return [Place(share, told, workers=workers) for _ in range(workers)]
