"""Puts emulated devices in the place of torch.cuda, for the rest of the process."""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from . import graphs, kernels, page_locks, streams, tensor
from .allocator import Memory

NAME = "an emulated card"
OPERATORS = (
    *("empty.memory_format", "empty_strided", "copy_", "_to_copy"),
    *("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "tril_indices"),
    "matmul",  # changes shapes in place
)


def install(count: int = 1) -> None:
    """Makes torch know `count` CUDA devices; once for a process. Raises RuntimeError where there is no C++ compiler."""
    if tensor.memories:
        return
    _register_guard()
    tensor.memories[:] = [Memory() for _ in range(count)]
    for name in OPERATORS:  # where torch does not come by the tensors' class
        overload = getattr(getattr(torch.ops.aten, name.split(".")[0]), [*name.split("."), "default"][1])
        torch.library.impl(f"aten::{name}", "CUDA", _operator(overload))
    for name, answer in _answers(count).items():
        setattr(torch.cuda, name, answer)
    _device_constructors()  # kept by torch: before these change, which `with device:` looks for
    for name in ("empty", "ones", "zeros"):
        setattr(torch, name, _with_pinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda each, *_: tensor.pin(each.clone())
    torch.Tensor.is_pinned = lambda each, *_: each.device.type == "cpu" and tensor.is_pinned(each)
    for name in ("quant.triton_kernels", "model.triton_rotary"):
        sys.modules[f"griffin_offload.{name}"] = kernels
    torch._C._cuda_hasPrimaryContext = lambda number: tensor.memories[number].started
    torch._C._cuda_endAllocateToPool = lambda *_: None
    sys.modules["pynvml"] = SimpleNamespace(  # type: ignore[assignment]
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda number: SimpleNamespace(used=tensor.memories[number].used),
    )


def _operator(overload: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: tensor.run(overload, args, kwargs)


def _register_guard() -> None:
    folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as built:
        library = Path(built) / "guard.so"
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{folder / 'include'}", f"-L{folder / 'lib'}"]
        source = Path(__file__).parent / "guard.cpp"
        try:
            subprocess.run([*command, str(source), "-lc10", "-o", str(library)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"an emulated GPU needs a C++ compiler: {error}") from error
        ctypes.CDLL(str(library))


def _with_pinned(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        found = make(*args, **kwargs)
        return tensor.pin(found) if pin_memory else found

    return made


def _answers(count: int) -> dict[str, Any]:
    def memory(device: Any = None) -> Memory:
        return tensor.memories[streams.as_device(device).index]

    def asked(device: Any = None) -> tuple[int, int]:
        memory(device).started = True
        return memory(device).free, memory(device).total

    def empty_cache() -> None:
        for each in tensor.memories:
            each.empty_cache()

    def set_fraction(fraction: float, device: Any = None) -> None:
        memory(device).limit = int(fraction * memory(device).total)

    def set_sync(mode: Any) -> None:
        tensor.state["sync"] = tensor.SYNC_MODES.get(mode, mode)

    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=8, L2_cache_size=2**20, warp_size=32, uuid="0"
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "is_initialized": lambda: any(each.started for each in tensor.memories),
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "current_device": streams.current_device,
        "set_device": streams.set_device,
        "device": streams.device,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.stream,
        "StreamContext": streams.stream,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "synchronize": streams.synchronize,
        "CUDAGraph": graphs.CUDAGraph,
        "graph": graphs.graph,
        "graph_pool_handle": graphs.graph_pool_handle,
        "is_current_stream_capturing": lambda: streams.current_stream().graph is not None,
        "get_sync_debug_mode": lambda: tensor.state["sync"],
        "set_sync_debug_mode": set_sync,
        "memory_allocated": lambda device=None: memory(device).allocated,
        "max_memory_allocated": lambda device=None: memory(device).peak_allocated,
        "memory_reserved": lambda device=None: memory(device).reserved,
        "max_memory_reserved": lambda device=None: memory(device).peak_reserved,
        "reset_peak_memory_stats": lambda device=None: memory(device).reset_peak(),
        "mem_get_info": asked,
        "cudart": lambda: page_locks,
        "empty_cache": empty_cache,
        "set_per_process_memory_fraction": set_fraction,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            **vars(properties), total_memory=memory(device).total
        ),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "_get_nvml_device_index": lambda device: device,
    }
