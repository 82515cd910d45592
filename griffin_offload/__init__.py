"""Griffin Offload: run language models bigger than the device's memory (GRIFFIN, arXiv:2404.01365)."""

from typing import TYPE_CHECKING, Any

from .errors import GriffinError
from .options import Decoding, ExportFormat, FfnSkip, Placement, Pruning
from .version import __version__

if TYPE_CHECKING:
    from .engine import Engine
    from .planning.plan import Plan
    from .pruning.prior import Prior
    from .report import Report
    from .run import Answer

# Lazily: these import torch, and `griffin --help` must not.
_LATER = {
    "Answer": "generation",
    "Engine": "engine",
    "Plan": "planning.plan",
    "Prior": "pruning.prior",
    "Report": "report",
}
__all__ = [
    "Answer",
    "Decoding",
    "Engine",
    "ExportFormat",
    "FfnSkip",
    "GriffinError",
    "Placement",
    "Plan",
    "Prior",
    "Pruning",
    "Report",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
