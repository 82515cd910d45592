"""bitsandbytes: 4 bits by a table of 16 values (Dettmers and others 2023, arXiv:2305.14314), and 8 bits by rows
(arXiv:2208.07339).

4 bits: two numbers in a byte, the first in the high half; W = table[q] * absmax of its block. absmax may be quantized
itself: table2[absmax] * absmax2 of 256 of them + an offset. The result is rounded to the dtype that was quantized.
8 bits: W = q * SCB[row] / 127; what LLM.int8() does to activations is not done."""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..headers import Shape, TensorInfo
from .rows import Rows, Settings, need

MOST = 2**16  # bytes of a description
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INVERSE = 7.874015718698502e-3  # 1 / 127, as bitsandbytes multiplies


def bnb_state(tensors: Mapping[str, TensorInfo], main: TensorInfo) -> tuple[str, dict[str, Any]]:
    """The tensor beside a 4-bit weight that describes it in JSON, and what it says. It is read: shapes depend on it.

    Raises ValueError, KeyError or TypeError where there is none, or it is not of the form."""
    names = [f"{main.name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    found = [tensors[name] for name in names if name in tensors]
    need(len(found) == 1, "no tensor beside it describes it")
    (info,) = found
    with info.file.open("rb") as file:
        file.seek(info.begin)
        state = json.loads(file.read(min(info.bytes, MOST)))
    rows, columns = state["shape"]
    nested = int(state.get("nested_blocksize") or 0)
    return info.name, {
        "rows": int(rows),
        "columns": int(columns),
        "block": int(state["blocksize"]),
        "block2": nested,
        "offset": float(state.get("nested_offset") or 0),
        "dtype": [str(dtype) for dtype in DTYPES].index(f"torch.{state['dtype']}"),
    }


def shape4(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    rows, columns = settings["rows"], settings["columns"]
    need(rows * columns == 2 * main.bytes and columns % 2 == 0, f"{main.bytes} bytes for {rows} x {columns} numbers")
    need(prod(sides["table"].shape) == 16, "a table that has not 16 values")
    need(settings["block"] > 0, "blocks of no number")
    blocks = -(-rows * columns // settings["block"])
    need(prod(sides["absmax"].shape) == blocks, f"{prod(sides['absmax'].shape)} scales for {blocks} blocks")
    if settings.get("block2"):
        need({"absmax2", "table2"} <= sides.keys(), "its quantized scales have no table")
        need(prod(sides["table2"].shape) == 256, "a table that has not 256 values")
        need(prod(sides["absmax2"].shape) == -(-blocks // settings["block2"]), "another number of scales of scales")
    return rows, columns


def dense4(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Rows of bytes (n, C / 2) -> (n, C), in the dtype that was quantized."""
    columns, block = settings["columns"], settings["block"]
    numbers = torch.stack([stored >> 4, stored & 15], dim=-1).int().flatten()
    first = rows.first * columns
    begin, end = first // block, -(-(rows.last * columns) // block)
    absmax = sides["absmax"].view(-1)[begin:end]
    if block2 := settings.get("block2"):
        of_block = sides["absmax2"].view(-1)[torch.arange(begin, end) // block2]
        offset = settings["offset"]
        absmax = sides["table2"].view(-1)[absmax.int()] * of_block + offset
    wide = absmax.float().repeat_interleave(block)[first - begin * block :][: len(numbers)]
    return (sides["table"].float().view(-1)[numbers] * wide).view(len(stored), columns).to(DTYPES[settings["dtype"]])


def shape8(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    need(len(main.shape) == 2 and sides["scale"].shape == main.shape[:1], "it has not one scale for each row")
    return main.shape


def dense8(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Rows of int8 numbers (n, C) -> float32 (n, C)."""
    return stored.float() * sides["scale"].float()[rows.first : rows.last, None] * INVERSE
