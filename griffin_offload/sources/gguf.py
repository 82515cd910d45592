"""A GGUF file -> a folder of bfloat16 safetensors with config and tokenizer, as transformers writes them.

Piece by piece: memory holds one shard and a piece of a dequantised tensor, never the model. The `gguf` package
dequantises; what llama.cpp changed in names and values is undone here, in float32, as transformers' loader does."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError, CheckpointError, UnsupportedArchitecture
from ..units import MIB, format_bytes
from .gguf_file import GgufFile, GgufTensor, read_gguf
from .gguf_model import ROPE_FACTORS, described, read_config, require_supported, write_tokenizer
from .hub import Progress, require_disk

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 1024 * MIB
PIECE = 2**25  # elements dequantised at a time
WORKING = 12  # bytes per element of a piece: as in the file, and float32 twice


def convert(path: Path, out: Path, *, on_progress: Progress | None = None, name: str = "") -> None:
    """Write the model in the GGUF file `path` as the new folder `out`. `name` is what errors and progress call it.

    Raises CheckpointError (damaged, or not what its header says), UnsupportedArchitecture, BudgetError."""
    name = name or path.name
    file = read_gguf(path, name)
    require_supported(file, name)
    _require_room(file, out.parent, name)
    with _quiet():
        config = read_config(file, name)
        out.mkdir()
        _write_weights(file, config, out, name, on_progress)
        write_tokenizer(file, config, out, name)
        config.save_pretrained(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' warnings and bars, off: what they say about a GGUF is for programmers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _require_room(file: GgufFile, folder: Path, name: str) -> None:
    """Memory for a shard and a piece, disk for the whole, before anything is written. Raises BudgetError."""
    from ..memory import available_memory

    elements = [tensor.elements for tensor in file.tensors]
    require_disk(folder, 2 * sum(elements) + 128 * MIB, f"{name} as bfloat16")
    pieces = [tensor.elements for tensor in file.tensors if _interleaved(file, tensor)]
    need = min(2 * sum(elements), max(SHARD, 2 * max(elements))) + WORKING * max([min(PIECE, max(elements)), *pieces])
    if (available := available_memory()) < need:
        raise BudgetError(
            f"converting {name} needs {format_bytes(need)} of memory and {format_bytes(available)} is available; "
            "close what else is running, or convert it on another machine and copy the folder"
        )


def _shapes(config: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs, by transformers' name, and its shape."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # whatever a module says of sizes that contradict one another
        raise CheckpointError(f"{name}: its header describes no model that can be built ({error})") from error
    config.architectures = [type(model).__name__]
    tied = set(model.all_tied_weights_keys)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}


def _targets(file: GgufFile, config: Any, name: str) -> dict[str, str]:
    """GGUF tensor name -> transformers' name, one to one. Raises for what is missing, unknown or of another shape."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    shapes = _shapes(config, name)
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == file.fields["general.architecture"])
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    targets = {names.get_name(key, try_suffixes=(".weight", ".bias")) or key: key for key in shapes}
    there = {tensor.name: tensor.shape for tensor in file.tensors if tensor.name != ROPE_FACTORS}
    if missing := targets.keys() - there.keys():
        raise CheckpointError(f"{name} lacks {len(missing)} of its tensors, such as {min(missing)}; fetch it again")
    if unknown := there.keys() - targets.keys():
        raise UnsupportedArchitecture(f"{name} has {len(unknown)} tensors that are not known, such as {min(unknown)}")
    for key, shape in there.items():
        if shape != shapes[targets[key]]:
            raise CheckpointError(f"{name}: {key} has the shape {shape}, and its header says {shapes[targets[key]]}")
    return targets


def _write_weights(file: GgufFile, config: Any, out: Path, name: str, on_progress: Progress | None) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and an index, in the file's own order of tensors."""
    targets = _targets(file, config, name)
    tensors = [tensor for tensor in file.tensors if tensor.name in targets]
    shards = _shards([tensor.elements for tensor in tensors])
    total, done = sum(tensor.bytes for tensor in tensors), 0
    weight_map: dict[str, str] = {}
    for number, (begin, end) in enumerate(shards, 1):
        title = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard: dict[str, Tensor] = {}
        for tensor in tensors[begin:end]:
            shard[targets[tensor.name]] = _bfloat16(file, tensor, config, name)
            done += tensor.bytes
            if on_progress:
                on_progress(f"converting {name}", done, total)
        _save(shard, out / title, name)
        weight_map |= dict.fromkeys(shard, title)
    if len(shards) > 1:
        size = 2 * sum(tensor.elements for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _interleaved(file: GgufFile, tensor: GgufTensor) -> bool:
    return described(file).interleaved and (".attn_q." in tensor.name or ".attn_k." in tensor.name)


def _bfloat16(file: GgufFile, tensor: GgufTensor, config: Any, name: str) -> "Tensor":
    """One tensor as transformers has it."""
    import torch

    interleaved = _interleaved(file, tensor)
    offset = described(file).norm_offset if tensor.name.endswith("norm.weight") else 0.0
    rows = tensor.shape[0]
    step = rows if interleaved or len(tensor.shape) == 1 else max(1, PIECE * rows // tensor.elements)
    out = torch.empty(tensor.shape, dtype=torch.bfloat16)
    for begin in range(0, rows, step):
        try:
            piece = torch.from_numpy(file.dense(tensor, begin, min(begin + step, rows)))
        except NotImplementedError as error:
            raise UnsupportedArchitecture(
                f"{name} is quantised as {tensor.kind.name}, which the gguf package cannot unpack"
            ) from error
        if interleaved:
            heads = config.num_attention_heads if ".attn_q." in tensor.name else config.num_key_value_heads
            piece = piece.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        out[begin : begin + step] = piece - offset if offset else piece
    return out


def _shards(elements: list[int]) -> list[tuple[int, int]]:
    """Ranges of tensors of at most SHARD bytes in bfloat16 each (or one larger tensor)."""
    cuts, size = [0], 0
    for index, count in enumerate(elements):
        if size and size + 2 * count > SHARD:
            cuts.append(index)
            size = 0
        size += 2 * count
    return list(zip(cuts, [*cuts[1:], len(elements)], strict=True))


def _save(shard: "dict[str, Tensor]", file: Path, name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(shard, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise BudgetError(f"{name}: {file.name} cannot be written ({error}); is the disk full?") from error
