"""Layers on several devices: what enters a layer moves to the layer's device, and what leaves the last one comes back.

The states of a pass move where the device changes. What all layers are given (a mask, rotary embeddings) moves to each
device once in a pass."""

from collections import UserDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

STATES = "hidden_states"


class Hops:
    """Acts on the forwards of decoder layers, layer i on `devices[i]`, until it is removed. `home`: of all else.

    The layers' buffers go to the device at once; their weights are there already."""

    def __init__(self, modules: Sequence[nn.Module], devices: Sequence[str], home: str) -> None:
        self._modules, self._home = modules, home
        self._moved: dict[str, dict[int, tuple[Tensor, Tensor]]] = {device: {} for device in devices}
        self._handles: list[Any] = []
        for index, (module, device) in enumerate(zip(modules, devices, strict=True)):
            if device == home:
                continue
            to_device(module, device)
            enter = _Enter(torch.device(device), self._moved[device])
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if index + 1 == len(modules) or devices[index + 1] != device:
                leave = _Leave(self._moved[device], torch.device(home) if index + 1 == len(modules) else None)
                self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Undoes all of it."""
        while self._handles:
            self._handles.pop().remove()
        for module in self._modules:
            to_device(module, self._home)


class _Enter:
    """Before a layer on another device. `moved`: what the pass has moved there, by the identity of the original, which
    it holds, so that no other tensor has the same."""

    def __init__(self, device: torch.device, moved: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._device, self._moved = device, moved

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:  # the states are new in each layer
            args = (_to(args[0], self._device), *(self._shared(each) for each in args[1:]))
        kwargs = {k: _to(v, self._device) if k == STATES else self._shared(v) for k, v in kwargs.items()}
        return args, kwargs

    def _shared(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device == self._device:
                return value
            if id(value) not in self._moved:
                self._moved[id(value)] = value, move(value, self._device)
            return self._moved[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(map(self._shared, value))
        if isinstance(value, dict | UserDict):  # in place: layers lay keys in it for others
            for name in list(value):
                value[name] = self._shared(value[name])
        return value


class _Leave:
    """After the last layer on a device: nothing of the pass is held any more; the states go `home`, if the last of all
    layers is there."""

    def __init__(self, moved: dict[int, tuple[Tensor, Tensor]], home: torch.device | None) -> None:
        self._moved, self._home = moved, home

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._moved.clear()
        if self._home is None or output is None:  # None: the layer has raised
            return output
        if isinstance(output, tuple):
            return (_to(output[0], self._home), *output[1:])
        return _to(output, self._home)


def to_device(module: nn.Module, device: str) -> None:
    """Moves the buffers of a module and of those within it."""
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            each._buffers[name] = buffer.to(device)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device: every one that a pass moves, and no other."""
    return tensor.to(device)


def _to(value: Any, device: torch.device) -> Any:
    return move(value, device) if isinstance(value, Tensor) and value.device != device else value
