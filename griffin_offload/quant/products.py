"""Products of many tokens with weights in half precision on a CPU: torch's own, or by blocks of rows in float32.

Processors without instructions for a dtype multiply in it several times slower than in float32. There a block of the
weight's rows is converted to float32, stays in the cache while all tokens are multiplied by it, and makes room for the
next one. Which way is quicker is measured, once for a machine.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..memory.measured import DAY, add_entry, machine_key, read_entry
from ..paths import cache_folder
from ..small_json import as_kind, need
from ..units import MIB

BLOCK = 2**20  # numbers of a block: 4 MiB
ROWS = 1024  # made dense at a time
TRIED = (16, 64)  # tokens; from half of a number on, what is quicker for it counts
QUICKER = 1.2  # how many times as quick blocks must be: a busy machine measures differences where there are none
LEAST = 64 * MIB  # of weights
HALVES = (torch.bfloat16, torch.float16)
Seconds = dict[str, list[float]]  # of both ways, for each number in TRIED

_fewest: dict[torch.dtype, int | None] = {}  # tokens from which blocks are quicker; None: never
_memory = threading.local()


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N), all in one dtype, by the quicker way for so many tokens."""
    return by_blocks(x, weight, bias) if in_blocks(x) else linear(x, weight, bias)


def in_blocks(x: Tensor) -> bool:
    """Whether float32 blocks are the quicker way for these tokens (..., K)."""
    fewest = _fewest.get(x.dtype)
    return fewest is not None and x.device.type == "cpu" and x.shape[:-1].numel() >= fewest


def is_chosen(x: Tensor) -> bool:
    """Whether many tokens like these are multiplied as quickly as this machine can."""
    return x.dtype in _fewest and x.device.type == "cpu"


def by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`dense_linear` by float32 blocks. Sums and bias are rounded to x's dtype once."""
    flat = x.reshape(-1, x.shape[-1]).float()
    out, end = x.new_empty(len(flat), len(weight)), 0
    for rows in weight.split(max(16, BLOCK // max(weight.shape[1], len(flat) // 2))):  # sums: twice a block at most
        begin, end = end, end + len(rows)
        block = _in_float(rows.t()).t() if rows.stride(0) < rows.stride(1) else _in_float(rows)
        out[:, begin:end] = linear(flat, block, None if bias is None else bias[begin:end].float())
    return out.view(*x.shape[:-1], -1)


def multiply_made(x: Tensor, count: int, make: Callable[[slice, torch.dtype], Tensor]) -> Tensor:
    """x (M, K) and a weight of `count` rows that `make(rows, dtype)` makes dense, (n, K) -> (M, count)."""
    out, flat = x.new_empty(len(x), count), x.float() if in_blocks(x) else x
    step = ROWS * x.element_size() // flat.element_size()
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        made = make(rows, flat.dtype)
        out[:, rows] = linear(flat, made)
        del made  # before the next ones
    return out


def _in_float(rows: Tensor) -> Tensor:
    """Rows in float32, in memory that the next ones take again."""
    if getattr(_memory, "block", rows[:0]).numel() < rows.numel():
        _memory.block = torch.empty(max(BLOCK, rows.numel()), dtype=torch.float32)
    return _memory.block[: rows.numel()].view(rows.shape).copy_(rows)  # type: ignore[no-any-return]


def load_libraries(dtype: torch.dtype) -> None:
    """Brings the libraries of products into memory, some 30 MiB, by a small one of both kinds; takes milliseconds."""
    with torch.no_grad():
        for each in (dtype, torch.float32):
            linear(torch.ones(TRIED[0], 1024, dtype=each), torch.ones(256, 1024, dtype=each))


def choose(dtype: torch.dtype, size: int) -> bool:
    """Makes `dense_linear` take the quicker way for this dtype on this machine, from now on. Returns whether that is
    ever by blocks. `size`: bytes of the model's weights; small ones are not worth a measurement.

    Measures for some 0.1 s, with 12 MiB, where the cache has no measurement of today; the best that was seen counts."""
    if dtype in HALVES and size >= LEAST:
        _fewest[dtype] = fewest_tokens(measured(dtype))
    return _fewest.get(dtype) is not None


def measured(dtype: torch.dtype) -> Seconds:
    """Seconds of a product by both ways, "torch" and "blocks", for each number of tokens in TRIED."""
    path, key = _path(), machine_key("cpu", dtype)
    age, entry = read_entry(path, key)
    known = _valid(entry)
    if known and 0 <= age < DAY:
        return known
    found = measure(dtype)
    if known:
        found = {way: [min(both) for both in zip(found[way], known[way], strict=True)] for way in found}
    add_entry(path, key, seconds=found)
    return found


def measure(dtype: torch.dtype, rows: int = 1024, columns: int = 2048) -> Seconds:
    """Measures now: the best of a few products of each kind, in turn."""
    weight = torch.ones(rows, columns, dtype=dtype)
    ways: dict[str, Callable[..., Tensor]] = {"torch": linear, "blocks": by_blocks}
    seconds: Seconds = {way: [] for way in ways}
    with torch.no_grad():
        for tokens in TRIED:
            x, times = torch.ones(tokens, columns, dtype=dtype), {way: [float("inf")] for way in ways}
            for _ in range(5):
                for way, product in ways.items():
                    start = time.perf_counter()
                    product(x, weight)
                    times[way].append(time.perf_counter() - start)
            for way in ways:
                seconds[way].append(min(times[way]))
    return seconds


def fewest_tokens(seconds: Seconds) -> int | None:
    """From how many tokens on blocks are quicker; None: never."""
    fewest = None
    for tokens, torchs, blocks in reversed(list(zip(TRIED, seconds["torch"], seconds["blocks"], strict=True))):
        if torchs < QUICKER * blocks:
            break
        fewest = tokens // 2
    return fewest


def chosen(dtype: torch.dtype) -> str:
    """Which products were chosen, in words."""
    fewest = _fewest.get(dtype)
    return "torch's own products" if fewest is None else f"float32 blocks from {fewest} tokens on"


def _valid(entry: dict[str, Any]) -> Seconds | None:
    """The entry's seconds; None unless they can be true."""
    with suppress(ValueError):
        told = need(entry, "seconds", dict)
        seconds = {way: [as_kind(value, float, way) for value in need(told, way, list)] for way in ("torch", "blocks")}
        if all(len(values) == len(TRIED) and min(values) > 0 for values in seconds.values()):
            return seconds
    return None


def _path() -> Path:
    return cache_folder() / "products.json"
