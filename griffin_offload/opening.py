"""Opens a model: finds it, and reads its config, tokenizer and headers. No weight is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checkpoint.extra_layers import without_extra_layers
from .checkpoint.headers import Checkpoint
from .checkpoint.reader import Reader, buffer_bytes
from .errors import CheckpointError, GriffinError, one_line
from .memory.heap import return_freed_memory
from .memory.host_cache import room_for_layers
from .memory.machine import device_budget, devices_of, held_memory, how_known
from .memory.out_of_memory import planned
from .memory.shared_tier import SharedTier
from .memory.upload import ring_for
from .model.architecture import ARCHITECTURES
from .model.attention import leave_cudnn_out
from .model.chat_template import take_processors_template
from .model.compute_dtype import compute_dtype
from .model.config_fields import override_fields
from .model.generation_fields import load_generation_config
from .model.modules import multiply_by_the_quicker_way
from .model.norms import norm_by_own_kernel, norm_by_torchs_kernel
from .model.pretrained import check_layers, read_headers
from .model.rotary_kernel import rotate_by_one_kernel
from .model.skeleton import Skeleton
from .model.tokenizer import load_tokenizer
from .native.library import check_asked
from .offload.probe import probe
from .open_model import OpenModel
from .options import Placement
from .planning.cards import card_here
from .planning.request import Card
from .planning.sizes import bounded, model_sizes
from .quant.products import choose, load_libraries
from .sources.resolve import resolve
from .units import parse_budget


def open_model(
    model: str | Path,
    placement: Placement,
    *,
    copies: bool | None = None,
    workers: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> OpenModel:
    """Find a model (and fetch it: `on_progress(what, done, total)` hears of that) and read its headers. `workers`:
    processes of this machine that read it.

    Raises ModelNotFound, CheckpointError, UnsupportedArchitecture or OptionError."""
    check_asked()
    return_freed_memory()  # before anything large is allocated: what the heap has grown to stays in use
    device, *others = devices_of(placement.device)
    path = resolve(model, on_progress=on_progress)
    headers = read_headers(path)
    config, checkpoint = headers.config, headers.checkpoint
    overridden = override_fields(path, config)
    check_layers(path, config, checkpoint)
    rows = Reader(files=checkpoint.files)
    with planned(device):  # a GPU may be too full for as much as its context
        dtype, other_dtype = compute_dtype(checkpoint, device, placement.dtype)
    skeleton = _skeleton(path, config, checkpoint, dtype, rows)
    used = {info.name for info in skeleton.layout.infos}
    checkpoint, extra = without_extra_layers(checkpoint, used, len(skeleton.layers))
    _to_device(skeleton, device, placement.threads)  # before `runtime` is counted
    settings, told = load_generation_config(path, skeleton.rows_of_table, headers.facts)
    skeleton.model.generation_config = settings
    tokenizer = load_tokenizer(path, headers.whole)
    take_processors_template(path, tokenizer)
    return_freed_memory()  # what reading the tokenizer left would be counted twice: what is allocated next fills it
    bounded(model_sizes(skeleton.layout), placement.context, str(model))
    runtime = held_memory(device)
    size, copies = placement.device_memory, device != "cpu" if copies is None else copies
    if not copies:
        norm_by_own_kernel(skeleton.model)
    elif device != "mps":  # whose operator was never tried
        norm_by_torchs_kernel(skeleton.model)
    if device == "cuda":
        rotate_by_one_kernel(skeleton.modules[0])
        leave_cudnn_out()
    ring = ring_for(device, skeleton.layout.converts) if copies else None
    asked = placement.host_memory
    host_memory, shared = room_for_layers(asked, copies or workers > 1), None
    if workers > 1:
        host_memory, shared = 0, SharedTier(workers, None if asked is None else host_memory)
    budget = device_budget(device) if size is None else parse_budget(size)
    first = [Card(device, budget, runtime, how_known(device))] if others else []
    return OpenModel(
        name=str(model),
        path=path,
        device=device,
        config=config,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        skeleton=skeleton,
        rows=rows,
        budget=budget,
        host_memory=host_memory,
        runtime=runtime,
        converts=_conversion_bytes(skeleton, ring.threads if ring else 1),
        static=device == "cuda" or (copies and device == "cpu"),
        ring=ring,
        host_memory_is_free=ring is not None and asked is None,
        context=placement.context,
        overridden=(*overridden, *other_dtype, *([str(extra)] if extra.tensors else []), *told),
        extra_layers=extra,
        shared=shared,
        cards=(*first, *(card_here(each, size) for each in others)),
    )


def _skeleton(path: Path, config: Any, checkpoint: Checkpoint, dtype: torch.dtype, rows: Reader) -> Skeleton:
    """The model without weights, bound to its checkpoint; one of a type in no table is probed."""
    try:
        skeleton = Skeleton(config, dtype)
        skeleton.bind(checkpoint, rows)
        if config.model_type not in ARCHITECTURES:
            probe(config, skeleton.entry)
    except GriffinError:
        raise
    except Exception as error:  # transformers' and torch's, of sizes that make no model
        raise CheckpointError(f"{path}/config.json does not describe a model: {one_line(error)}") from None
    return skeleton


def _to_device(skeleton: Skeleton, device: str, threads: int | None) -> None:
    """Its buffers; and of a CPU the threads and the libraries of products."""
    if threads:
        torch.set_num_threads(threads)
        skeleton.threads.adapts = False
    with planned(device):
        skeleton.to_device(device)
    if device == "cpu":
        load_libraries(skeleton.layout.dtype)
        if choose(skeleton.layout.dtype, model_sizes(skeleton.layout).full):
            multiply_by_the_quicker_way(skeleton.model)


def _conversion_bytes(skeleton: Skeleton, threads: int) -> int:
    """Bytes of the reading threads' buffers, where weights have another dtype or form on disk."""
    return threads * buffer_bytes(skeleton.layout.infos, skeleton.layout.dtype)
