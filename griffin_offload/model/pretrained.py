"""Reads a checkpoint's config and headers. An error becomes one line that names the file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.configuration_utils import get_configuration_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint.gguf.link import gguf_link
from ..checkpoint.headers import Checkpoint
from ..checkpoint.inside import require_own_names
from ..checkpoint.quantized.find import QUANTIZATION, dense_weights, quantization
from ..errors import CheckpointError, GriffinError, UnsupportedArchitecture, one_line
from ..files import reason
from ..inputs import SETTINGS, VOCABULARY, require_plain
from ..small_json import read_object
from .architecture import architecture
from .config_allowed import allowed_config
from .config_bounds import bounded_config
from .multimodal import text_checkpoint, text_config


@dataclass(frozen=True)
class Headers:
    """What a folder says of its model. `facts`: config.json; `whole`: transformers' config of all of it; `config` and
    `checkpoint`: of the text model, which is a part of a multimodal wrapper."""

    facts: Mapping[str, Any]
    whole: Any
    config: Any
    checkpoint: Checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises CheckpointError."""
    require_small_files(folder)
    path = folder / "config.json"
    try:
        facts = read_object(path)
        require_own_names(facts, "configuration_files", path)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from None
    return facts


def load_config(folder: Path, facts: Mapping[str, Any]) -> Any:
    """transformers' config. `facts`: of `read_config`. Raises CheckpointError; UnsupportedArchitecture for unknown
    types."""
    try:
        if "configuration_files" in facts:
            facts = read_object(folder / get_configuration_file(facts["configuration_files"]))
        fields = bounded_config(PreTrainedConfig._decode_special_floats(facts))
        kind = _class_of(fields)
        return kind.from_dict(allowed_config(fields, kind), name_or_path=str(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None
    except KeyError as error:
        raise UnsupportedArchitecture(f"{folder}/config.json: transformers does not know {error}") from None
    except Exception as error:  # transformers checks fields with exceptions of its own
        if any(word in " ".join(str(error).split()) for word in ("model type", "model_type", "trust_remote_code")):
            raise UnsupportedArchitecture(f"{folder}/config.json: {_model_type(facts)}") from None
        raise CheckpointError(f"{folder}/config.json cannot be used: {one_line(error)}") from None


def _class_of(facts: dict[str, Any]) -> Any:
    """transformers' class of a config, as AutoConfig chooses it. Raises ValueError for an unknown type."""
    kind = facts.get("model_type")
    if kind == "mistral" and "layer_types" in facts:
        kind = facts["model_type"] = "ministral"
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError("model_type is not known")
    return CONFIG_MAPPING[kind]


def require_small_files(folder: Path) -> None:
    """Raises CheckpointError for a file of settings or of a vocabulary that is none, such as a pipe, or too large."""
    for path in folder.iterdir() if folder.is_dir() else ():
        vocabulary = path.name.startswith(("tokenizer", "vocab", "merges", "tekken")) or ".index." in path.name
        if path.suffix in _SMALL:
            try:
                require_plain(path, VOCABULARY if vocabulary or path.suffix not in (".json", ".jinja") else SETTINGS)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def open_checkpoint(folder: Path, facts: Mapping[str, Any] | None = None) -> Checkpoint:
    """The headers of a folder's safetensors, or of the GGUF file that has its weights. `facts`: of its config.json,
    where that has been read. Raises CheckpointError."""
    link = gguf_link(folder)
    return link.open(folder) if link else Checkpoint.open(folder, facts)


def read_headers(folder: Path) -> Headers:
    """Reads the config, once, and the tensors' headers, of weights that others quantized as the reader gives them.
    Raises CheckpointError, UnsupportedArchitecture."""
    facts = read_config(folder)
    whole, checkpoint = load_config(folder, facts), open_checkpoint(folder, facts)
    try:
        return Headers(facts, whole, *_of_text(folder, whole, checkpoint))
    except GriffinError:
        raise
    except Exception as error:  # transformers', of fields that make no model
        raise CheckpointError(f"{folder}/config.json does not describe a model: {one_line(error)}") from None


def _of_text(folder: Path, whole: Any, checkpoint: Checkpoint) -> tuple[Any, Checkpoint]:
    for part in (whole, getattr(whole, "text_config", None)):  # before anything counts so many
        count = getattr(part, "num_hidden_layers", None)
        if type(count) is int and not 0 < count <= max(1, len(checkpoint.tensors)):
            check_layers(folder, part, checkpoint)
    config = text_config(whole)
    if facts := quantization(whole):
        try:
            checkpoint = dense_weights(checkpoint, facts, dense_dtype(config))
        except UnsupportedArchitecture as error:
            raise UnsupportedArchitecture(f"{folder}: {error}") from None
        for name in QUANTIZATION:  # the model is not quantized any more, nor is what is exported of it
            vars(config).pop(name, None)
    return config, checkpoint if config is whole else text_checkpoint(whole, config, checkpoint)


def dense_dtype(config: Any) -> torch.dtype:
    """What weights are computed in that are quantized on disk: the config's dtype, or bfloat16."""
    dtype = getattr(torch, str(getattr(config, "dtype", None)).removeprefix("torch."), torch.bfloat16)
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def check_layers(folder: Path, config: Any, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the files have the layers that the config asks for. For before modules are built.

    They may have more: see extra_layers.py."""
    if not checkpoint.tensors:
        raise CheckpointError(f"{folder} holds no tensors")
    layers = r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d{1,9})\."
    found = [int(part[1]) for name in checkpoint.tensors if (part := re.search(layers, name))]
    found = found or [int(part[1]) for name in checkpoint.tensors if (part := re.search(r"(?:^|\.)(\d{1,9})\.", name))]
    there, wanted = max(found, default=-1) + 1, getattr(config, "num_hidden_layers", None)
    if type(wanted) is not int or not 1 <= wanted <= there:
        raise CheckpointError(f"{folder}/config.json asks for {wanted} layers; the files hold {there}")


def _model_type(facts: Mapping[str, Any]) -> str:
    """What is wrong with a model_type. Raises UnsupportedArchitecture, with the reason, for a refused type."""
    kind = facts.get("model_type")
    if not isinstance(kind, str):
        return "its model_type is missing"
    architecture(kind)
    return f"model type {kind!r} is not supported: this version of transformers does not know it"
