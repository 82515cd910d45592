"""The table of formats: which tensors of a file hold one weight, its shape, and how its numbers are computed.

A weight is held by a main tensor, which has its numbers, and by side tensors (scales, zero points ...). It is decoded a
few stored rows at a time, so that no more memory is needed than for these and the side tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..headers import Shape, TensorInfo
from . import awq, bnb, compressed, fp4, fp8, gptq, mxfp4, turned
from .bits import WORD
from .rows import Rows, Settings

# How a stored row lies in the weight (R, C): as a row, as columns, or as a column of an expert of (E, C, R).
ROWS, COLUMNS, EXPERTS = "rows", "columns", "experts"
INTEGERS = ("torch.int32",)
FP8 = ("torch.float8_e4m3fn", "torch.float8_e5m2")


@dataclass(frozen=True)
class Format:
    """`method`: the config's quant_method. `main`: the suffix of the tensor with the numbers, of one of `dtypes`;
    `weight`: that of the weight in the model; `sides`: role -> suffix, of `optional` ones too.

    `shape`: the weight's shape, or ValueError for tensors that do not fit each other. `dense`: stored rows -> their
    numbers as they lie in the weight, rounded as the format's own library rounds them. `place`: how stored rows lie in
    it; `columns`, `rows`: of how many columns a stored row has numbers, and of how many rows each of its elements."""

    method: str
    main: str
    weight: str
    sides: Mapping[str, str]
    dtypes: tuple[str, ...]
    shape: Callable[[TensorInfo, Mapping[str, TensorInfo], Settings], Shape]
    dense: Callable[[Tensor, Mapping[str, Tensor], Rows, Settings], Tensor]
    optional: Mapping[str, str] | None = None
    place: str = ROWS
    columns: Callable[[Settings], int] = lambda _: 1
    rows: Callable[[Settings], int] = lambda _: 1


_ZERO = {"zero": "weight_zero_point", "order": "weight_g_idx"}
FORMATS = {
    "fp8": Format("fp8", "", "", {"scale": "_scale_inv"}, FP8, fp8.shape, fp8.dense),
    "fp8-autofp8": Format("fp8", "weight", "weight", {"scale": "weight_scale"}, FP8, fp8.shape, fp8.dense),
    "compressed-packed": Format(
        "compressed-tensors",
        "weight_packed",
        "weight",
        {"scale": "weight_scale"},
        INTEGERS,
        compressed.packed_shape,
        compressed.packed_dense,
        optional=_ZERO | {"shape": "weight_shape"},
    ),
    "compressed": Format(
        "compressed-tensors",
        "weight",
        "weight",
        {"scale": "weight_scale"},
        (*FP8, "torch.int8"),
        compressed.plain_shape,
        compressed.plain_dense,
        optional=_ZERO,
    ),
    "compressed-fp4": Format(
        "compressed-tensors",
        "weight_packed",
        "weight",
        {"scale": "weight_scale"},
        ("torch.uint8",),
        fp4.shape,
        fp4.dense,
        optional={"global": "weight_global_scale"},
    ),
    "gptq": Format(
        "gptq",
        "qweight",
        "weight",
        {"scale": "scales", "zero": "qzeros"},
        INTEGERS,
        gptq.shape,
        gptq.dense,
        optional={"order": "g_idx"},
        place=COLUMNS,
        columns=lambda settings: int(WORD // settings["bits"]),
    ),
    "awq": Format(
        "awq",
        "qweight",
        "weight",
        {"scale": "scales", "zero": "qzeros"},
        INTEGERS,
        awq.shape,
        awq.dense,
        place=COLUMNS,
        rows=lambda _: WORD // awq.BITS,
    ),
    "mxfp4": Format(
        "mxfp4", "_blocks", "", {"scale": "_scales"}, ("torch.uint8",), mxfp4.shape, mxfp4.dense, place=EXPERTS
    ),
    "bitsandbytes-4": Format(
        "bitsandbytes",
        "weight",
        "weight",
        {"absmax": "weight.absmax", "table": "weight.quant_map"},
        ("torch.uint8", "torch.bfloat16", "torch.float16", "torch.float32"),
        bnb.shape4,
        bnb.dense4,
        optional={"absmax2": "weight.nested_absmax", "table2": "weight.nested_quant_map"},
    ),
    "bitsandbytes-8": Format(
        "bitsandbytes",
        "weight",
        "weight",
        {"scale": "SCB"},
        ("torch.int8",),
        bnb.shape8,
        bnb.dense8,
        optional={"form": "weight_format"},
    ),
    turned.NAME: Format("", "", "", {}, (), turned.shape, turned.dense, place=EXPERTS),  # not quantized: of no method
}
METHODS = frozenset(format.method for format in FORMATS.values() if format.method)
