"""Times quantized products on a CPU: microseconds and GB/s of one matrix, by our own kernels and by those before them.

python scripts/cpu-products.py TOKENS...; GRIFFIN_CPU, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA choose instructions."""

import os
import sys
import time
from contextlib import nullcontext

import torch

from griffin_offload.memory.arena import Arena
from griffin_offload.model.decode_kernels import own_kernels
from griffin_offload.model.format_speeds import FILLING
from griffin_offload.native.library import chosen
from griffin_offload.quant.formats import FORMATS, allocate_weight

SHAPES = [(4096, 4096), (8192, 2048), (2048, 8192), (576, 1536)]


def compare(format: str, rows: int, columns: int, tokens: int) -> str:
    """Both kinds of kernels in turn, over more memory than caches hold."""
    size = int(FORMATS[format].bytes(rows, columns, 2))
    count, x, weights = min(24, 400 * 2**20 // size), torch.randn(tokens, columns).bfloat16(), {}
    for asked in ("none", BEST):
        os.environ["GRIFFIN_CPU"] = asked
        arena = Arena(count * size)
        arena.memory.fill_(FILLING)
        weights[asked] = [allocate_weight(format, arena, rows, columns, torch.bfloat16) for _ in range(count)]
    best = dict.fromkeys(weights, 1e9)
    for number in range(3 * count):
        for asked, each in weights.items():
            begin = time.perf_counter()
            each[number % count].linear(x)
            best[asked] = min(best[asked], time.perf_counter() - begin)
    times = [f"{each[0].kernel} {best[a] * 1e6:.0f} us, {size / best[a] / 1e9:.1f} GB/s" for a, each in weights.items()]
    return f"{rows} x {columns} {format}, {tokens} tokens: {'; '.join(times)}; {best['none'] / best[BEST]:.2f} x"


BEST = chosen()
for shape in SHAPES:
    for format in ("int8", "int4"):
        for tokens in sys.argv[1:]:
            with torch.no_grad(), own_kernels() if tokens == "1" else nullcontext():  # as in decoding
                print(compare(format, *shape, int(tokens)), flush=True)
