"""Layers of a checkpoint that the model itself does not run: those that draft further tokens (MTP heads).

They stand behind the last layer (DeepSeek-V3, GLM-4.5: `model.layers.61`), or under a name of their own (Qwen3.5,
Nemotron, Mellum: `mtp`). They are neither read nor counted."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from ..units import format_bytes
from .headers import Checkpoint, TensorInfo

_MTP = re.compile(r"(?:^|.*\.)mtp(?:_\w+)?(?=\.)")
_NUMBERED = re.compile(r"(.*(?:^|\.)(?:layers|h|blocks|layer)\.)(\d{1,9})(?=\.)")


@dataclass(frozen=True)
class ExtraLayers:
    """`tensors` of the files that belong to such layers; `modules`: what their names begin with."""

    modules: tuple[str, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()

    @property
    def bytes(self) -> int:
        """Of the files, scales of quantized weights included."""
        return sum(info.all_bytes for info in self.tensors)

    def __str__(self) -> str:
        shown = ", ".join(self.modules[:3]) + (" ..." if len(self.modules) > 3 else "")
        return f"{shown} of the files ({format_bytes(self.bytes)}): layers that draft further tokens"


def without_extra_layers(checkpoint: Checkpoint, used: Collection[str], layers: int) -> tuple[Checkpoint, ExtraLayers]:
    """A checkpoint that does not count them, and what they are. `used`: the tensors of a model of so many `layers`."""
    stacks = {part[1] for name in used if (part := _NUMBERED.match(name)) and int(part[2]) < layers}
    found: dict[str, list[TensorInfo]] = {}
    for name, info in {**checkpoint.tensors, **checkpoint.others}.items():
        if name not in used and (module := _module(name, stacks, layers)):
            found.setdefault(module, []).append(info)
    extra = ExtraLayers(tuple(found), tuple(info for infos in found.values() for info in infos))
    counted = 0 if checkpoint.others else extra.bytes  # of a wrapper the text model alone is counted
    return replace(checkpoint, bytes=checkpoint.bytes - counted), extra


def _module(name: str, stacks: Collection[str], layers: int) -> str:
    if mtp := _MTP.match(name):
        return mtp[0]
    numbered = _NUMBERED.match(name)
    return numbered[0] if numbered and numbered[1] in stacks and int(numbered[2]) >= layers else ""
