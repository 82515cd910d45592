"""A CUDA device's memory: the context of this process, what its tensors hold, and what other processes leave.

A device is 'cuda', which is the first, or 'cuda:1' and so on.

The context (with the libraries' code on the device) is no tensor, so that torch does not count it. It is there from
the first use of the device to the end of the process."""

from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..units import MIB

ESTIMATE = 600 * MIB  # of a context, where it cannot be measured: more than most have
LIKELY = (64 * MIB, 2048 * MIB)  # outside of it, another process has taken or freed memory meanwhile


def is_cuda(device: str) -> bool:
    return device.partition(":")[0] == "cuda"


def index(device: str) -> int:
    """0 of 'cuda', 1 of 'cuda:1'."""
    return int(device.partition(":")[2] or 0)


@cache
def context(device: str) -> tuple[int, bool]:
    """Makes the context. Bytes that it takes on the device, and whether they were measured: by NVML, if nothing in this
    process used the device before; `ESTIMATE` otherwise."""
    before = None if _is_in_use(device) else _used_by_all(device)
    ones = torch.ones(64, 64, dtype=torch.float16, device=device)
    torch.mm(ones, ones)  # loads the libraries, as the first product of a run would
    torch.cuda.synchronize(index(device))  # waits for it
    after = _used_by_all(device)
    if before is not None and after is not None:
        taken = after - before - torch.cuda.memory_reserved(index(device))
        if LIKELY[0] <= taken <= LIKELY[1]:
            return taken, True
    return ESTIMATE, False


def held(device: str) -> int:
    """Bytes of the device that this process holds: context and tensors."""
    return context(device)[0] + int(torch.cuda.memory_allocated(index(device)))


def peak(device: str) -> int:
    """The most bytes of the device that this process held: context, tensors, and blocks that torch kept for later."""
    return context(device)[0] + int(torch.cuda.max_memory_reserved(index(device)))


def free(device: str) -> int:
    """Bytes of the device that this process can still take; blocks that torch keeps for later are free."""
    number = index(device)
    kept = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    return int(torch.cuda.mem_get_info(number)[0]) + int(kept)


def others(device: str) -> int:
    """Bytes of the device that are neither free nor this process's: other processes', and the driver's own."""
    return max(0, int(torch.cuda.mem_get_info(index(device))[1]) - held(device) - free(device))


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has products in bfloat16: a GPU before Ampere has none, nor attention that writes no scores."""
    if not is_cuda(device):
        return True
    context(device)  # measured before anything else uses the device
    return torch.cuda.get_device_capability(index(device)) >= (8, 0)


def give_back(device: str) -> None:
    """Returns the blocks that torch's allocator keeps for later to the device, and to all its like. No effect on a
    CPU."""
    if is_cuda(device):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def _is_in_use(device: str) -> bool:
    """Whether this process has used the device before."""
    if not torch.cuda.is_initialized() or not index(device):
        return bool(torch.cuda.is_initialized())
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return has_context is None or bool(has_context(index(device)))


def _used_by_all(device: str) -> int | None:
    """Bytes of the device that all processes use, by NVML (nvidia-ml-py); None without it. Makes no context."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        number = torch.cuda._get_nvml_device_index(index(device))  # as CUDA_VISIBLE_DEVICES has it
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(number)).used)
    except Exception:  # NVML's own errors: no library, no driver, no permission
        return None
