"""Graphics cards that are not there: torch.cuda's questions about memory, and NVML's, answered from a few numbers."""

import sys
from collections.abc import Callable, Sequence
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
        install([self], patch)
        return self


def install(cards: Sequence[Card], patch: pytest.MonkeyPatch) -> None:
    """These cards are torch's from here on, but for their products."""
    ones = torch.ones

    def start(*shape: int, device: str | None = None, **options: object) -> torch.Tensor:
        if device is None or not cuda.is_cuda(device):
            return ones(*shape, device=device, **options)
        cards[cuda.index(device)].started = True
        return ones(*shape, **options)

    def empty_cache() -> None:
        for card in cards:
            card.cached = 0

    def reset(number: int = 0) -> None:
        cards[number].peak = cards[number].reserved

    def asked(number: int = 0) -> tuple[int, int]:
        card = cards[number]
        card.started = True
        return card.total - card.used, card.total

    answers: dict[str, Callable[..., object]] = {
        "is_available": lambda: True,
        "device_count": lambda: len(cards),
        "is_initialized": lambda: any(card.started for card in cards),
        "synchronize": lambda number=0: None,
        "memory_allocated": lambda number=0: cards[number].allocated,
        "memory_reserved": lambda number=0: cards[number].reserved,
        "max_memory_reserved": lambda number=0: cards[number].peak,
        "mem_get_info": asked,
        "empty_cache": empty_cache,
        "reset_peak_memory_stats": reset,
        "_get_nvml_device_index": lambda device: device,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(torch, "ones", start)
    patch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda number: cards[number].started, raising=False)
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda number: SimpleNamespace(used=cards[number].used),
    )
    patch.setitem(sys.modules, "pynvml", nvml)
    cuda.context.cache_clear()
