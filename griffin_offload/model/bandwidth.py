"""Measures how fast a token reads the resident weights, which limits decoding."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..units import MIB
from .decode_kernels import own_kernels


def read_by_a_token(model: Any) -> list[Tensor]:
    """The weights that decoding one token reads: all but an embedding that is not also lm_head."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return [p.data for p in model.parameters() if p is head or p is not table]


def memory_bandwidth(weights: Iterable[Tensor], passes: int = 5, seconds: float = 0.3) -> float:
    """Bytes per second in which these matrices are read, at best in a few passes: multiplied by one token, or
    (on a CPU) searched for the largest number, which is quicker without instructions for their dtype. Those on several
    devices one device after the other, as a token does.

    Codes of quantized weights are read as if they were bfloat16."""
    matrices = [w if w.is_floating_point() else _as_bfloat16(w) for w in weights if w.dim() == 2 and w.numel()]
    shapes = {(w.shape[1], w.dtype, w.device) for w in matrices}
    inputs = {shape: torch.ones(1, shape[0], dtype=shape[1], device=shape[2]) for shape in shapes}
    total = sum(w.numel() * w.element_size() for w in matrices)
    words = [_words(w) for w in matrices if w.device.type == "cpu" and w.is_contiguous() and w.numel() >= 4]
    devices = dict.fromkeys(w.device for w in matrices)
    on_each = {device: [w for w in matrices if w.device == device] for device in devices}
    ways: list[Callable[[torch.device], Any]] = [
        lambda device: [linear(inputs[w.shape[1], w.dtype, device], w) for w in on_each[device]]
    ]
    if len(words) == len(matrices):
        ways.append(lambda _: [numbers.amax() for numbers in words])
    best, end = float("inf"), time.perf_counter() + seconds
    for number in range(passes if matrices else 0):
        if number and time.perf_counter() > end:
            break
        for read in ways:
            start = time.perf_counter()
            for device in devices:
                with own_kernels():
                    read(device)
                wait_for(device.type, device.index)
            best = min(best, time.perf_counter() - start)
    return float(total / best)


def memory_bandwidth_here(device: str, size: int = 256 * MIB) -> float:
    """`memory_bandwidth` of a bfloat16 matrix of `size` bytes."""
    return memory_bandwidth([torch.ones(size // 4096, 2048, dtype=torch.bfloat16, device=device)])


def wait_for(device: str, number: int | None = None) -> None:
    """Returns when the device, or the one of several with this number, has done all that it was given: CPUs have."""
    if device == "mps":
        torch.mps.synchronize()
    elif device == "cuda":
        torch.cuda.synchronize(number)


def _words(matrix: Tensor) -> Tensor:
    """The bytes of a matrix as whole numbers of 32 bits, but for the last ones."""
    flat = matrix.view(-1)
    return flat[: flat.numel() // 4 * 4].view(torch.int32)


def _as_bfloat16(codes: Tensor, columns: int = 1024) -> Tensor:
    """Bytes -> as many whole rows of `columns` bfloat16 numbers as they make."""
    flat = codes.view(-1).view(torch.uint8)
    return flat[: flat.numel() // (2 * columns) * 2 * columns].view(torch.bfloat16).view(-1, columns)
