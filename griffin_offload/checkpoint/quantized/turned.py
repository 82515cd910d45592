"""Experts that a file holds turned, not quantized: (E, C, R) where the model has (E, R, C), as Qwen3-VL's mixtures are
published."""

from collections.abc import Mapping

from torch import Tensor

from ..headers import Packed, Shape, TensorInfo
from .rows import Rows, Settings

NAME = "turned"


def turned(info: TensorInfo) -> TensorInfo:
    """A tensor (E, C, R) -> the weight (E, R, C) that it holds."""
    experts, columns, rows = info.shape
    weight: Shape = (experts, rows, columns)
    packed = Packed(NAME, weight, info, (), (), last=experts)
    return TensorInfo(info.name, info.dtype, weight, info.file, info.begin, info.end, packed)


def shape(main: TensorInfo, sides: Mapping[str, TensorInfo], settings: Settings) -> Shape:
    return turned(main).shape


def dense(stored: Tensor, sides: Mapping[str, Tensor], rows: Rows, settings: Settings) -> Tensor:
    """Stored rows (n, R) -> (R, n): columns of an expert."""
    return stored.T
