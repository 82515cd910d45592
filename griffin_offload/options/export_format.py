"""What an export is written as."""

from dataclasses import dataclass

from .declare import option, whole
from .group import Checked


@dataclass(frozen=True)
class ExportFormat(Checked):
    """What an export is written as."""

    format: str = option(
        "safetensors",
        "A folder that transformers loads, or a file that llama.cpp runs.",
        choices=("safetensors", "gguf"),
    )
    gguf_type: str | None = option(
        None,
        "Type of the matrices in a GGUF file; vectors are f32.",
        choices=("bf16", "f16", "f32", "q8_0"),
        default="bf16",
    )
    multiple_of: int | None = whole(
        None,
        "Round the kept neurons of every layer up to a multiple of N. llama.cpp's K-quants need 256.",
        low=1,
        allowed="1 or more",
        strict=True,
        default="1; for GGUF 32",
    )
