"""The structural fall-back for a model type that no table names: decoder layers and blocks by shape and name.

What is found here is a guess until a probe has shown that it computes the same (see probe.py).
"""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedArchitecture
from .architecture import Architecture, Experts, FeedForward

OTHERS = re.compile(r"att|norm|conv|mamba|ssm")  # modules of a layer that have projections of their own
DOWN = re.compile(r"down|out|fc2|w2|Wo|c_proj|4h_to_h")  # tells which is which where F happens to be the hidden size


def find_structure(model: Any) -> Architecture:
    """The decoder layers of a model (on meta), and every pair of an up (or gate and up, or both in one) and a down
    projection in them. Raises UnsupportedArchitecture, saying what was not found."""
    kind, count = model.config.model_type, model.config.num_hidden_layers
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    if not stacks:
        raise UnsupportedArchitecture(
            f"model type {kind!r} is not known, and no list of {count} layers was found in it"
        )
    path = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    blocks: dict[FeedForward | Experts, str] = {}
    for index, layer in enumerate(stacks[path]):
        found = [
            block
            for name, module in layer.named_modules()
            if not OTHERS.search(name) and (block := _block(name, module, model.config))
        ]
        if not found:
            raise UnsupportedArchitecture(
                f"model type {kind!r} is not known, and no up and down projections were found in {path}.{index}"
            )
        blocks |= dict(found)
    return Architecture(path, blocks)


def _block(path: str, module: Any, config: Any) -> tuple[FeedForward | Experts, str] | None:
    """The block that `module` is, or whose projections are its children: one down (F -> hidden), and what makes F of
    hidden. With the config's name for F."""
    hidden = config.hidden_size
    if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
        return Experts(path), _size(config, module.down_proj.shape[1 if module.is_transposed else 2])
    shapes = {name: _in_out(child) for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}
    downs = [n for n, (rows, out) in shapes.items() if out == hidden and (rows != hidden or DOWN.search(n))]
    if len(downs) != 1:
        return None
    neurons = shapes[downs[0]][0]
    into = {name: out for name, (rows, out) in shapes.items() if rows == hidden and name not in downs}
    ups = [name for name, out in into.items() if out in (neurons, 2 * neurons)]
    halves = [shapes[name][1] == 2 * neurons for name in ups]
    if not ups or len(ups) > (1 if any(halves) else 2):
        return None
    prefix = f"{path}." if path else ""
    return FeedForward(tuple(prefix + name for name in ups), prefix + downs[0], any(halves)), _size(config, neurons)


def _size(config: Any, neurons: int) -> str:
    """A field of the config that holds this number and is named for it: a guess, which an export checks."""
    names = (name for name, value in vars(config).items() if value == neurons)
    return next((name for name in names if "intermediate" in name or "ffn" in name or "inner" in name), "")


def _in_out(module: nn.Module) -> tuple[int, int]:
    first, second = module.weight.shape  # type: ignore[misc, operator]
    return (int(first), int(second)) if isinstance(module, Conv1D) else (int(second), int(first))
