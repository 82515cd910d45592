"""How fast this machine reads weights: the limit of decoding, measured on the weights themselves."""

import time
from collections.abc import Iterable
from typing import Any

from ..units import MIB


def read_by_a_token(model: Any) -> list[Any]:
    """The weights of a transformers model that decoding one token reads: all but an embedding table that is not the
    head too."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return [p.data for p in model.parameters() if p is head or p is not table]


def memory_bandwidth(weights: Iterable[Any], passes: int = 5, seconds: float = 0.3) -> float:
    """Bytes a second at which one token passes through these matrices (torch tensors), products and nothing else.

    The limit of decoding on this machine, measured on the very weights: the best pass of a few. Codes of packed weights
    are read as if they were bfloat16: as fast as memory goes, whatever they mean."""
    import torch

    from .decode_kernels import own_kernels

    matrices = [w if w.is_floating_point() else _as_bfloat16(w) for w in weights if w.dim() == 2 and w.numel()]
    inputs = {w.shape[1]: torch.ones(1, w.shape[1], dtype=w.dtype, device=w.device) for w in matrices}
    total = sum(w.numel() * w.element_size() for w in matrices)
    best, end = float("inf"), time.perf_counter() + seconds
    for number in range(passes if matrices else 0):
        if number and time.perf_counter() > end:
            break
        start = time.perf_counter()
        with own_kernels():
            for w in matrices:
                torch.nn.functional.linear(inputs[w.shape[1]], w)
        if matrices[0].is_cuda:
            torch.cuda.synchronize()  # waits for the products
        best = min(best, time.perf_counter() - start)
    return float(total / best)


def memory_bandwidth_here(device: str, size: int = 256 * MIB) -> float:
    """Bytes a second at which this machine reads weights, of a matrix made for it, bfloat16."""
    import torch

    return memory_bandwidth([torch.ones(size // 4096, 2048, dtype=torch.bfloat16, device=device)])


def _as_bfloat16(codes: Any, columns: int = 1024) -> Any:
    """The whole rows of `columns` numbers that there are in these bytes."""
    import torch

    flat = codes.view(-1).view(torch.uint8)
    return flat[: flat.numel() // (2 * columns) * 2 * columns].view(torch.bfloat16).view(-1, columns)
