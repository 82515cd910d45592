"""A CUDA device's memory: the context of this process, what its tensors hold, and what other processes leave.

The context (with the libraries' code on the device) is no tensor, so that torch does not count it. It is there from
the first use of the device to the end of the process."""

from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..units import MIB

ESTIMATE = 600 * MIB  # of a context, where it cannot be measured: more than most have
LIKELY = (64 * MIB, 2048 * MIB)  # outside of it, another process has taken or freed memory meanwhile


@cache
def context() -> tuple[int, bool]:
    """Makes the context. Bytes that it takes on the device, and whether they were measured: by NVML, if nothing in this
    process used the device before; `ESTIMATE` otherwise."""
    before = None if torch.cuda.is_initialized() else _used_by_all()
    ones = torch.ones(64, 64, dtype=torch.float16, device="cuda")
    torch.mm(ones, ones)  # loads the libraries, as the first product of a run would
    torch.cuda.synchronize()  # waits for it
    after = _used_by_all()
    if before is not None and after is not None:
        taken = after - before - torch.cuda.memory_reserved()
        if LIKELY[0] <= taken <= LIKELY[1]:
            return taken, True
    return ESTIMATE, False


def held() -> int:
    """Bytes of the device that this process holds: context and tensors."""
    return context()[0] + int(torch.cuda.memory_allocated())


def free() -> int:
    """Bytes of the device that this process can still take; blocks that torch keeps for later are free."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + int(kept)


def others() -> int:
    """Bytes of the device that are neither free nor this process's: other processes', and the driver's own."""
    return max(0, int(torch.cuda.mem_get_info()[1]) - held() - free())


def give_back(device: str) -> None:
    """Returns the blocks that torch's allocator keeps for later to the device. No effect on a CPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def _used_by_all() -> int | None:
    """Bytes of the device that all processes use, by NVML (nvidia-ml-py); None without it. Makes no context."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        number = torch.cuda._get_nvml_device_index(0)  # as CUDA_VISIBLE_DEVICES has it
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(number)).used)
    except Exception:  # NVML's own errors: no library, no driver, no permission
        return None
