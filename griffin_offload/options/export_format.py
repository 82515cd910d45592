"""What an export is written as."""

from dataclasses import dataclass

from .declare import option, whole
from .group import Checked
from .names import EXPORT_FORMATS, GGUF_TYPES


@dataclass(frozen=True)
class ExportFormat(Checked):
    """What an export is written as."""

    format: str = option(
        "safetensors", "A folder that transformers loads, or a file that llama.cpp runs.", choices=EXPORT_FORMATS
    )
    gguf_type: str | None = option(
        None, "Type of the matrices in a GGUF file; vectors are f32.", choices=GGUF_TYPES, default="bf16"
    )
    multiple_of: int | None = whole(
        None,
        "Round the kept neurons of every layer up to a multiple of N. llama.cpp's K-quants need 256.",
        low=1,
        allowed="1 or more",
        strict=True,
        default="1; for GGUF 32",
    )
