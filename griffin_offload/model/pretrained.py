"""Loads a checkpoint's config, generation config and tokenizer. An error becomes one line that names the file."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ..checkpoint.gguf.link import gguf_link
from ..checkpoint.headers import Checkpoint
from ..checkpoint.quantized.find import QUANTIZATION, dense_weights, quantization
from ..errors import CheckpointError, UnsupportedArchitecture, one_line
from .architecture import architecture
from .multimodal import text_checkpoint, text_config


def load_config(folder: Path) -> Any:
    """transformers' config. Raises CheckpointError; UnsupportedArchitecture for unknown types."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except KeyError as error:
        raise UnsupportedArchitecture(f"{folder}/config.json: transformers does not know {error}") from None
    except Exception as error:  # transformers checks fields with exceptions of its own
        if any(word in " ".join(str(error).split()) for word in ("model type", "model_type", "trust_remote_code")):
            raise UnsupportedArchitecture(f"{folder}/config.json: {_model_type(folder)}") from None
        raise CheckpointError(f"{folder}/config.json cannot be used: {one_line(error)}") from None
    return config


def open_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a folder's safetensors, or of the GGUF file that has its weights. Raises CheckpointError."""
    link = gguf_link(folder)
    return link.open(folder) if link else Checkpoint.open(folder)


def read_headers(folder: Path) -> tuple[Any, Checkpoint]:
    """The config and the tensors' headers of a folder's text model; of a multimodal wrapper those of the text model
    inside, and of weights that others quantized as the reader gives them. Raises CheckpointError,
    UnsupportedArchitecture."""
    whole, checkpoint = load_config(folder), open_checkpoint(folder)
    config = text_config(whole)
    if facts := quantization(whole.to_dict()):
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
    """Raises CheckpointError unless the config has as many layers as the files. For before modules are built."""
    numbers = [int(part[1]) for name in checkpoint.tensors if (part := re.search(r"(?:^|\.)(\d{1,9})\.", name))]
    there, wanted = max(numbers, default=-1) + 1, getattr(config, "num_hidden_layers", None)
    if type(wanted) is not int or wanted < 1 or wanted != there:
        raise CheckpointError(f"{folder}/config.json asks for {wanted} layers; the files hold {there}")


def _model_type(folder: Path) -> str:
    """What is wrong with a folder's model_type. Raises UnsupportedArchitecture, with the reason, for a refused type."""
    kind = None
    with suppress(OSError, ValueError, AttributeError):
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if not isinstance(kind, str):
        return "its model_type is missing"
    architecture(kind)
    return f"model type {kind!r} is not supported: this version of transformers does not know it"


def load_generation_config(folder: Path, config: Any) -> GenerationConfig:
    """transformers' generation config: the model's own sampling and end tokens. Raises CheckpointError."""
    try:
        if (folder / "generation_config.json").exists():
            settings = GenerationConfig.from_pretrained(folder)
        else:
            settings = GenerationConfig.from_model_config(config)
    except Exception as error:
        raise CheckpointError(f"{folder}/generation_config.json cannot be used: {one_line(error)}") from None
    end = settings.eos_token_id
    if not all(isinstance(token, int) for token in (end if isinstance(end, list) else [0 if end is None else end])):
        raise CheckpointError(f"{folder}/generation_config.json cannot be used: eos_token_id is {one_line(end)}")
    if settings.pad_token_id is None:
        settings.pad_token_id = end[0] if isinstance(end, list) else end
    return settings


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer, without the checkpoint's own code. Raises CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # many libraries, many exceptions
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {one_line(error)}") from None
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = _processors_template(folder)
    return tokenizer


def _processors_template(folder: Path) -> str | None:
    """The chat template that a multimodal checkpoint's processor has in a file of its own; None where there is none."""
    with suppress(OSError, ValueError, AttributeError):
        template = json.loads((folder / "chat_template.json").read_text()).get("chat_template")
        return template if isinstance(template, str) else None
    return None
