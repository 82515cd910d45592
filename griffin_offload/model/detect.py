"""Guesses the decoder layers and blocks of an unknown model type, by shapes and names; offload/probe.py tests them."""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedArchitecture
from .architecture import Architecture, Experts, FeedForward

OTHERS = re.compile(r"att|norm|conv|mamba|ssm")  # other modules of a layer that have projections
DOWN = re.compile(r"down|out|fc2|w2|Wo|c_proj|4h_to_h")  # decides if F is the hidden size


def find_structure(model: Any) -> Architecture:
    """A model on meta -> its decoder layers, and every pair of up (gate and up, or both in one) and down projections.

    Raises UnsupportedArchitecture if there are none."""
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
    """The block in a module, with the config's field for F, or None. Its children are one down projection, F -> hidden,
    and one or two up, hidden -> F or 2 F."""
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
    """The config's field for the number of neurons, by its value and name, or ''. An export checks it."""
    names = (name for name, value in vars(config).items() if value == neurons)
    return next((name for name in names if "intermediate" in name or "ffn" in name or "inner" in name), "")


def _in_out(module: nn.Module) -> tuple[int, int]:
    first, second = module.weight.shape  # type: ignore[misc, operator]
    return (int(first), int(second)) if isinstance(module, Conv1D) else (int(second), int(first))
