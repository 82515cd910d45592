"""Whether a CUDA graph could record a static step: a run of it on tensors without numbers shows two kinds of fault.

Where the code asks for a number, to decide what to compute next, torch refuses; and a tensor that is still on the host,
or made there, is seen as such."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from griffin_offload import Engine
from griffin_offload.model.static_step import StaticStep


class OnlyOnTheDevice(TorchDispatchMode):
    """Raises RuntimeError for an operation that reads or makes a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                raise RuntimeError(f"{func} is computed on the host")
        if func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError("a number of the host is copied to the device")
        return out


def assert_recordable(engine: Engine, step: StaticStep) -> None:
    """`step` has decoded tokens of this engine's on the CPU; the engine cannot be used any more."""
    (token,) = step._answers.values()
    engine.resident.unload()  # every weight is on `meta`, torch's device without numbers
    for module in engine.skeleton.model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _without_numbers(buffer)
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(_without_numbers(weight), requires_grad=False)
    for layer in token._cache.layers:
        layer._room._keys, layer._room._values = map(_without_numbers, (layer._room._keys, layer._room._values))
    for holder in (token, *token._rings.values(), *([token.rows] if token.rows else [])):
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                setattr(holder, name, _without_numbers(value))
    token._steps.clear()
    if step._looked_up:
        step._looked_up.ahead = token.rows
    with OnlyOnTheDevice(), torch.no_grad():
        token.step()[1]()
    assert token.logits.device.type == "meta"


def _without_numbers(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
