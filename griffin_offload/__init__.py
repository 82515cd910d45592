"""Griffin Offload: run language models bigger than the device's memory (GRIFFIN, arXiv:2404.01365)."""

from typing import TYPE_CHECKING, Any

from .errors import GriffinError
from .version import __version__

if TYPE_CHECKING:
    from .engine import Answer, Engine

__all__ = ["Answer", "Engine", "GriffinError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "Answer"):  # lazily: they import torch, and `griffin --help` must not
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
