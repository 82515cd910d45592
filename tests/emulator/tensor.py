"""Tensors of an emulated device, and the operators on them."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from . import streams
from .allocator import Memory, Storages

COPIES = {"aten::copy_", "aten::_to_copy"}
FROM_HOST = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # their indices may be the host's
WAITING = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::nonzero_numpy"),
    *("aten::repeat_interleave", "aten::item"),
}
EMPTY = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}
SYNC_MODES = {"default": 0, "warn": 1, "error": 2}

memories: list[Memory] = []
storages = Storages()
pinned: dict[int, int] = {}  # of pinned memory of the host: begin -> end
state = {"sync": 0}


class CudaTensor(Tensor):
    """A tensor of an emulated device. `ram`: what is in it."""

    ram: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, ram: Tensor, device: torch.device) -> "CudaTensor":
        made: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, ram.shape, ram.stride(), ram.storage_offset(), dtype=ram.dtype, device=device
        )
        made.ram = ram
        stream = streams.current_stream(device)
        own = None if stream.graph is not None else stream  # a recording's memory is its own
        storages.hold(made, ram, memories[device.index], own, streams.freed)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.ram}, {self.device})"

    def tolist(self) -> Any:
        no_waiting("tolist")
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.ram.data_ptr()

    def untyped_storage(self) -> Any:
        return CudaStorage(self.ram.untyped_storage(), self.device)

    def set_(self, storage: Any) -> "CudaTensor":  # type: ignore[override]
        return CudaTensor(torch.empty(0, dtype=self.dtype).set_(storage.ram), self.device)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class CudaStorage:
    """The storage of a tensor of an emulated device."""

    def __init__(self, ram: Any, device: torch.device) -> None:
        self.ram, self.device = ram, device

    def nbytes(self) -> int:
        return int(self.ram.nbytes())

    def data_ptr(self) -> int:
        return int(self.ram.data_ptr())

    def resize_(self, size: int) -> None:
        self.ram.resize_(size)
        storages.resized(self.ram)

    def cpu(self) -> Any:
        no_waiting("a copy of a storage")
        return self.ram.clone()

    def copy_(self, source: Any, non_blocking: bool = False) -> None:
        no_waiting("a copy of a storage")
        self.ram.copy_(source)


def no_waiting(what: str) -> None:
    """Raises where the host may not wait for the device."""
    graph = streams.current_stream().graph
    if graph is not None:
        graph.refuse(what)
    if state["sync"] == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")


def is_pinned(tensor: Tensor) -> bool:
    return any(begin <= tensor.data_ptr() < end for begin, end in pinned.items())


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on tensors of one device, or a copy. Raises RuntimeError for tensors of several."""
    name = func._schema.name
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    there = {each.device for each in tensors if each.device.type == "cuda"}
    if name in COPIES:
        return copy(name, args, kwargs)
    asked = kwargs.get("device")
    device = streams.as_device(asked) if asked is not None and torch.device(asked).type == "cuda" else None
    if asked is not None and device is None and there:
        raise RuntimeError(f"{name} makes no {asked} tensor of one on {there}")
    if len(there) > 1 or any(each.dim() and each.device.type == "cpu" for each in tensors):
        if name not in FROM_HOST or len(there) > 1 or args[0].device.type == "cpu":
            others = sorted({str(each.device) for each in tensors})
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found {' and '.join(others)}"
            )
        no_waiting(f"{name} with indices of the host")
    device = device or next(iter(there))
    masks = name in FROM_HOST and any(each.dtype in (torch.bool, torch.uint8) for each in tensors[1:])
    if name in WAITING or masks:
        no_waiting(name)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    inputs = {id(each.ram): each for each in tensors if isinstance(each, CudaTensor)}
    shapes = {key: each.shape for key, each in inputs.items()}
    args, kwargs = tree_map(in_ram, (args, kwargs))
    stream = streams.current_stream(device)
    with streams.lock:
        out = stream.graph.record(func, args, kwargs) if stream.graph is not None else None
        if out is None:
            out = func(*args, **kwargs)
        if name in EMPTY:
            torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage()).fill_(0xFF)  # NaN, or -1
        if not func.is_view and stream.graph is None:
            _submit(stream, func, name, args, kwargs, out)
        if name == "aten::_local_scalar_dense":
            streams.host_waits(stream, stream.number, dict(stream.known))

    def on_device(each: Any) -> Any:
        if type(each) is not Tensor:
            return each
        if id(each) in inputs:
            if each.shape != shapes[id(each)]:
                raise NotImplementedError(f"{name} changes a tensor's shape in place")
            return inputs[id(each)]
        return CudaTensor(each, device)

    return tree_map(on_device, out)


def in_ram(each: Any) -> Any:
    return each.ram if isinstance(each, CudaTensor) else each


def _submit(stream: Any, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
    writes = {_key(each) for each in tree_iter(out) if isinstance(each, Tensor)}
    for given, argument in _with_schema(func, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes |= {_key(each) for each in tree_iter(given) if isinstance(each, Tensor)}
    reads = {_key(each) for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)} - writes
    stream.submit(name, reads, writes, None)


def _with_schema(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    arguments = func._schema.arguments
    by_name = {argument.name: argument for argument in arguments}
    return [*zip(args, arguments, strict=False), *((given, by_name[name]) for name, given in kwargs.items())]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def copy(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """copy_ or _to_copy: between devices, or on one. Returns the target."""
    if name == "aten::copy_":
        target, source = args[0], args[1]
        returns_early = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if type(source) is Tensor and source.dtype != target.dtype:
            source = source.to(target.dtype)  # torch converts in a buffer of its own, here or there
    else:
        source, returns_early = args[0], bool(kwargs.get("non_blocking", False))
        target = _made(source, kwargs)
    if isinstance(source, CudaTensor) and isinstance(target, CudaTensor):
        _copy_there(name, target, source)
    else:
        _copy_between(name, target, source, returns_early)
    return target


def _made(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What _to_copy copies to."""
    wanted = torch.device(kwargs.get("device") or source.device)
    more = {key: kwargs[key] for key in ("dtype", "memory_format") if kwargs.get(key) is not None}
    made = torch.empty_like(in_ram(source), **more)
    if wanted.type == "cuda":
        return CudaTensor(made, streams.as_device(wanted))
    return pin(made) if kwargs.get("non_blocking") else made


def _copy_there(name: str, target: CudaTensor, source: CudaTensor) -> None:
    """On one device, or from one to another: then torch has each stream wait for the other."""
    stream, sending = streams.current_stream(target.device), streams.current_stream(source.device)
    with streams.lock:
        if stream.graph is not None:
            stream.graph.record(torch.ops.aten.copy_.default, (target.ram, source.ram), {})
            return
        if sending is not stream:
            sending.wait_stream(stream)
        sending.submit(name, {_key(source.ram)}, {_key(target.ram)}, None)
        target.ram.copy_(source.ram)
        if sending is not stream:
            stream.wait_stream(sending)


def _copy_between(name: str, target: Tensor, source: Tensor, returns_early: bool) -> None:
    """Between the host and a device. It waits, unless it is told not to and the host's memory is pinned."""
    from_host = type(source) is Tensor
    there, here = in_ram(target), in_ram(source)
    pageable = not is_pinned(here if from_host else there)
    stream = streams.current_stream(target.device if from_host else source.device)
    if stream.graph is not None and pageable:
        stream.graph.refuse(f"{name} with memory of the host that is not pinned")
    waits = not returns_early or (pageable and not from_host)
    if waits:
        no_waiting(f"{name} between host and device")
    reads, writes = (set(), {_key(there)}) if from_host else ({_key(here)}, set())
    with streams.lock:
        if stream.graph is not None:
            stream.graph.record(torch.ops.aten.copy_.default, (there, here), {})
        elif waits:
            stream.submit(name, reads, writes, None)
            there.copy_(here)
            streams.host_waits(stream, stream.number, dict(stream.known))
        elif stream.default and from_host:  # what follows on the stream is done at once, and needs it
            stream.submit(name, reads, writes, None)
            there.copy_(here)
        else:
            # CUDA takes pageable memory before it returns. What the default stream does next may not change the source.
            kept = here.clone() if pageable or stream.default else here
            stream.submit(name, reads, writes, lambda: there.copy_(kept))


def pin(tensor: Tensor) -> Tensor:
    begin = tensor.data_ptr()
    pinned[begin] = begin + max(1, tensor.untyped_storage().nbytes())
    weakref.finalize(tensor, pinned.pop, begin, None).atexit = False
    return tensor
