"""Devices that are not there: tensors on them lie in RAM, and say that they are on another device.

As with CUDA, an operator that is given tensors of two devices is an error, unless it copies; a number (a tensor without
dimensions) of the CPU goes with any.

    make_devices()
    torch.ones(2, device="card:1") + torch.ones(2)  # RuntimeError
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "card"
COPIES = ("aten::copy_", "aten::_to_copy")


class CardTensor(Tensor):
    """A tensor of a device that is not there. `ram`: what is in it."""

    ram: Tensor

    @staticmethod
    def __new__(cls, ram: Tensor, device: torch.device) -> "CardTensor":
        made: CardTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, ram.shape, ram.stride(), ram.storage_offset(), dtype=ram.dtype, device=device
        )
        made.ram = ram
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.ram}, {self.device})"

    def tolist(self) -> Any:
        return self.ram.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on tensors of one device: it runs in RAM. Raises RuntimeError for tensors of several."""
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    devices = {each.device for each in tensors if each.dim() or each.device.type != "cpu"}
    copies = func._schema.name in COPIES
    if len(devices) > 1 and not copies:
        raise RuntimeError(f"{func} got tensors on {' and '.join(sorted(map(str, devices)))}")
    asked = kwargs.get("device")
    if asked is not None:
        device = torch.device(asked)
        if device.type == KIND:
            kwargs = {**kwargs, "device": torch.device("cpu")}
    elif copies:
        device = args[0].device
    else:
        device = next(iter(devices), torch.device("cpu"))
    of_ram = {id(each.ram): each for each in tensors if isinstance(each, CardTensor)}
    args, kwargs = tree_map(lambda each: each.ram if isinstance(each, CardTensor) else each, (args, kwargs))
    if func._schema.name == "aten::_to_copy" and device.type == KIND:
        kwargs.pop("pin_memory", None)
    out = func(*args, **kwargs)
    if device.type != KIND:
        return out

    def on_device(each: Any) -> Any:
        if type(each) is not Tensor:
            return each
        return of_ram[id(each)] if id(each) in of_ram else CardTensor(each, device)

    return tree_map(on_device, out)


@cache
def make_devices() -> None:
    """Makes torch know the devices 'card:0', 'card:1' ...; once for the process. By torch's own way to a device that is
    written in Python: every operator on one is `run`."""
    _setup_privateuseone_for_python_backend(KIND)
    for name in ("empty.memory_format", "empty_strided", "copy_", "_to_copy"):  # also where torch skips subclasses
        operator = getattr(torch.ops.aten, name.split(".")[0])
        overload = getattr(operator, name.split(".")[1] if "." in name else "default")
        torch.library.impl(f"aten::{name}", "PrivateUse1", lambda *args, _o=overload, **kwargs: run(_o, args, kwargs))
