"""A graphics card that is not there: torch.cuda's questions about memory, and NVML's, answered from a few numbers."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from griffin_offload.memory import cuda
from griffin_offload.units import GIB, MIB


@dataclass
class Card:
    """Bytes. `allocated`: of this process's tensors; `cached`: of blocks that its allocator keeps."""

    total: int = 24 * GIB
    others: int = 2 * GIB
    context: int = 450 * MIB
    allocated: int = 0
    cached: int = 0
    peak: int = 0
    started: bool = False

    @property
    def reserved(self) -> int:
        return self.allocated + self.cached

    @property
    def used(self) -> int:
        return self.others + self.reserved + (self.context if self.started else 0)

    def take(self, count: int) -> None:
        """As torch's allocator does: from what it kept, or else from the card."""
        self.cached -= min(count, self.cached)
        self.allocated += count
        self.peak = max(self.peak, self.reserved)

    def free(self, count: int) -> None:
        self.allocated, self.cached = self.allocated - count, self.cached + count

    def install(self, patch: pytest.MonkeyPatch) -> "Card":
        """This card is torch's from here on, but for its products."""
        ones = torch.ones

        def start(*shape: int, device: str | None = None, **options: object) -> torch.Tensor:
            if device != "cuda":
                return ones(*shape, device=device, **options)
            self.started = True
            return ones(*shape, **options)

        def empty_cache() -> None:
            self.cached = 0

        def reset() -> None:
            self.peak = self.reserved

        def asked() -> tuple[int, int]:
            self.started = True
            return self.total - self.used, self.total

        answers: dict[str, Callable[..., object]] = {
            "is_initialized": lambda: self.started,
            "synchronize": lambda: None,
            "memory_allocated": lambda: self.allocated,
            "memory_reserved": lambda: self.reserved,
            "max_memory_reserved": lambda: self.peak,
            "mem_get_info": asked,
            "empty_cache": empty_cache,
            "reset_peak_memory_stats": reset,
            "_get_nvml_device_index": lambda device: device,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "ones", start)
        nvml = SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=self.used),
        )
        patch.setitem(sys.modules, "pynvml", nvml)
        cuda.context.cache_clear()
        return self
