"""GGUF files of the tiny models, as llama.cpp's converter writes them; and their tensors as our reader has them."""

import json
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from griffin_offload.checkpoint.gguf.link import read_link
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.sources import gguf_convert as gguf

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3_text": "gemma3"}


F32, Q8 = ggml.GGMLQuantizationType.F32, ggml.GGMLQuantizationType.Q8_0


def write_gguf(
    folder: Path, out: Path, *, kind: Any = F32, bos: bool = True, without: str = "", extra: Any = None, **fields: Any
) -> Path:
    """The checkpoint in `folder` as llama.cpp's converter writes it. `fields` are more metadata, __ for '.' in a key;
    `without` leaves a tensor out, `extra` is (name, array)."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    name = ARCHITECTURES[config.model_type]
    writer = ggml.GGUFWriter(out, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    _write_vocabulary(writer, tokenizer, bos)
    for key, value in fields.items():
        title = key.replace("__", ".").replace("ARCH", name)
        kinds = (
            (bool, writer.add_bool),
            (str, writer.add_string),
            (float, writer.add_float32),
            (list, writer.add_array),
        )
        add = next((add for kind, add in kinds if isinstance(value, kind)), writer.add_uint32)
        add(title, value)
    names = ggml.get_tensor_name_map(
        next(key for key, value in ggml.MODEL_ARCH_NAMES.items() if value == name), config.num_hidden_layers
    )
    for key, tensor in load_file(folder / "model.safetensors").items():
        title = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if title == without:
            continue
        data = _as_llama_cpp(tensor.float().numpy(), title, config)
        if kind.name.endswith("_K") and data.ndim > 1:  # numpy cannot make them: any will do
            blocks = random_blocks(kind.name, data.size // 256, seed=len(title))
            writer.add_tensor(title, blocks.reshape(len(data), -1), raw_dtype=kind)
        elif kind != F32 and data.ndim > 1:
            writer.add_tensor(title, ggml.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(title, data)
    if extra is not None:
        writer.add_tensor(*extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _as_llama_cpp(data: Any, title: str, config: Any) -> Any:
    """What llama.cpp's converter does to a model's values."""
    if config.model_type.startswith("gemma") and title.endswith("norm.weight"):
        return data + np.float32(1)
    if config.model_type == "llama" and (".attn_q." in title or ".attn_k." in title):
        heads = config.num_attention_heads if ".attn_q." in title else config.num_key_value_heads
        rows = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
        return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(data.shape))
    return data


def _write_vocabulary(writer: Any, tokenizer: Any, bos: bool) -> None:
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if word in tokenizer.all_special_tokens else 1 for word, _ in words])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def in_place(file: Path, out: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a GGUF file by a folder made for it."""
    gguf.link(file, out)
    link = read_link(out)
    assert link
    infos = link.open(out).tensors
    tensors, reader = {name: torch.empty(info.shape, dtype=dtype) for name, info in infos.items()}, Reader()
    reader.read({info: tensors[name] for name, info in infos.items()})
    reader.close()
    assert reader.bytes == sum(info.bytes for info in infos.values())
    return tensors


# Where a block's scales are, two bytes each.
SCALES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
}


def random_blocks(kind: str, count: int, seed: int = 0) -> Any:
    """(count, bytes), uint8: any bits, with scales that make numbers of order 1."""
    generator, size = np.random.default_rng(seed), ggml.GGML_QUANT_SIZES[ggml.GGMLQuantizationType[kind]][1]
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    for place in SCALES.get(kind, (0,)):
        scales = generator.uniform(1e-4, 2e-3, (count, 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks
