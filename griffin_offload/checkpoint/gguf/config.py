"""A GGUF file's header <-> transformers' config, tokenizer and generation config."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import BudgetError, CheckpointError, UnsupportedArchitecture, one_line
from ...foreign import NAME, shown
from .fields import check_fields, one_for_all
from .header import GgufFile
from .rope import FACTORS, SCALING_FIELDS, llama3_rope, scaling, scaling_fields
from .tokenizer import ALIASES, check_tokenizer, split_as
from .values import Values


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp writes a model type.

    `interleaved`: the rows of q and k alternate, for its rotary code. `norm_offset`: is added to norms. `fields`: more
    of _FIELDS. `written_as_it`: types that differ in name only."""

    model_type: str
    interleaved: bool = False
    norm_offset: float = 0.0
    fields: dict[str, str] = field(default_factory=dict)
    written_as_it: tuple[str, ...] = ()

    def changes(self, config: Any, name: str) -> tuple[int, float]:
        """A tensor's name in the file -> (heads with interleaved rows or 0, offset that is added)."""
        heads = 0
        if self.interleaved and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return heads, self.norm_offset if name.endswith("norm.weight") else 0.0


_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping"} | _CAP
GGUF_ARCHS = {
    "llama": GgufArchitecture("llama", interleaved=True, written_as_it=("mistral",)),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma2": GgufArchitecture("gemma2", norm_offset=1.0, fields=_WINDOW | _CAPS),
    "gemma3": GgufArchitecture("gemma3_text", norm_offset=1.0, fields=_WINDOW | _CAP),
}
_EPSILON = "attention.layer_norm_rms_epsilon"
# GGUF field (after the architecture's name) -> transformers' config
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    _EPSILON: "rms_norm_eps",
}
LEAST_ID = -(2**31)  # of a token: some files say none by -1
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# (type, layers) -> a value that the file does not have; other sizes of these types divide by the root of head_dim.
QUERY_SCALARS = {("gemma2", 46): 144, ("gemma3_text", 62): 168}
# Byte-level vocabularies that get a BOS if the file does not say, in llama.cpp and in their own tokenizers.
BOS_BY_DEFAULT = ("llama-bpe", "tekken")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def arch_of(file: GgufFile) -> GgufArchitecture:
    return GGUF_ARCHS[file.fields.text("general.architecture")]


def require_supported(file: GgufFile, name: str) -> None:
    """Raises UnsupportedArchitecture or CheckpointError for a file that is no whole model, or would be read wrongly."""
    if (parts := file.fields.whole("split.count") or 1) > 1:
        raise CheckpointError(f"{name} is one of {parts} parts; join them first with llama.cpp's gguf-split --merge")
    architecture, kind = file.fields.text("general.architecture", "?"), file.fields.text("general.type", "model")
    if kind == "adapter" or "adapter.type" in file.fields:
        raise CheckpointError(
            f"{name} is an adapter (LoRA), not a model: merge it into its base model with llama.cpp's "
            "llama-export-lora, and give that file"
        )
    if kind == "mmproj" or architecture == "clip":
        raise CheckpointError(f"{name} is a projector for images (mmproj), not a model: give the model's own file")
    if architecture not in GGUF_ARCHS:
        raise UnsupportedArchitecture(
            f"{name} holds a {shown(architecture, NAME)!r} model; GGUF files of {', '.join(GGUF_ARCHS)} can be read. "
            "Its original safetensors folder may still work"
        )
    if not file.tensors:
        raise CheckpointError(f"{name} holds a vocabulary and no weights; give the file of the whole model")
    if file.fields.whole(f"{architecture}.expert_count"):
        raise UnsupportedArchitecture(f"{name} is a mixture of experts, which Griffin cannot prune")
    check_tokenizer(file.fields)


def read_config(file: GgufFile, name: str) -> Any:
    """A header -> transformers' config. Raises CheckpointError if it says too little or contradicts itself."""
    from transformers import AutoConfig

    architecture, prefix = arch_of(file), file.fields.text("general.architecture")
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    own = one_for_all(file.fields.of(f"{prefix}."), prefix)
    vocabulary = file.fields.of("tokenizer.ggml.")
    values: dict[str, Any] = {ours: own.whole(theirs) for theirs, ours in _FIELDS.items() if theirs != _EPSILON}
    values[_FIELDS[_EPSILON]] = own.number(_EPSILON)
    if wrong := sorted(key for key, value in values.items() if not value and key != "num_key_value_heads"):
        raise CheckpointError(f"{name}: its header does not say {', '.join(wrong)}")
    values |= {ours: vocabulary.whole(key, LEAST_ID) for key, ours in _IDS.items() if key in vocabulary}
    if "token_embd.weight" not in shapes or values["num_hidden_layers"] > len(shapes):
        raise CheckpointError(f"{name} has no embeddings, or fewer layers than its header says")
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    values["head_dim"] = own.whole("attention.key_length") or _head_dim(values, own, shapes)
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    rope = {"rope.freq_base": "rope_theta"} | (
        {"rope.freq_base_swa": "rope_local_base_freq"} if prefix == "gemma3" else {}
    )
    applied = rope | architecture.fields
    numbers = {ours: own.whole(key) if key in _WINDOW else own.number(key) for key, ours in applied.items()}
    values |= {ours: number for ours, number in numbers.items() if number}
    if found := scaling(own, prefix):
        values["rope_scaling"] = found
    if architecture.model_type.startswith("gemma"):
        size = architecture.model_type, values["num_hidden_layers"]
        values["query_pre_attn_scalar"] = QUERY_SCALARS.get(size, values["head_dim"])
    try:
        config = AutoConfig.for_model(architecture.model_type, dtype="bfloat16", **values)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise CheckpointError(
            f"{name}: its header describes no {architecture.model_type} model ({one_line(error)})"
        ) from error
    check_fields(own, {*_FIELDS, *applied, *SCALING_FIELDS}, config, prefix)
    factors = next((tensor for tensor in file.tensors if tensor.name == FACTORS), None)
    if factors is not None:
        if factors.kind.name != "F32" or factors.shape != (config.head_dim // 2,):
            told = f"{list(factors.shape)} of type {factors.kind.name}"
            raise CheckpointError(
                f"{name}: {FACTORS} is {told}, not [{config.head_dim // 2}] of type F32: fetch it again"
            )
        config.rope_parameters = llama3_rope(config, file.dense(factors), name)
    return config


def _head_dim(values: dict[str, Any], header: Values, shapes: dict[str, tuple[int, ...]]) -> int:
    """The size of a head where the header does not say it: the rotated part, if the queries have so many rows."""
    heads, rotated = int(values["num_attention_heads"]), header.whole("rope.dimension_count")
    rows = shapes.get("blk.0.attn_q.weight", (0,))[0]
    return rotated if rotated and rows == heads * rotated else int(values["hidden_size"]) // heads


def written_as(model_type: str) -> str | None:
    """The architecture's name in a GGUF file; None for a type that we cannot write."""
    return next((name for name, a in GGUF_ARCHS.items() if model_type in (a.model_type, *a.written_as_it)), None)


def written_types() -> tuple[str, ...]:
    return tuple(t for a in GGUF_ARCHS.values() for t in (a.model_type, *a.written_as_it))


def config_fields(config: Any, name: str) -> dict[str, Any]:
    """transformers' config -> the header's fields, for `read_config` and for llama.cpp."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    table = _FIELDS | GGUF_ARCHS[name].fields
    fields = {key: getattr(config, ours) for key, ours in table.items() if getattr(config, ours, None) is not None}
    fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    fields |= {"rope.freq_base": float(rope["rope_theta"]), "vocab_size": config.vocab_size, **scaling_fields(rope)}
    return {f"{name}.{key}": value for key, value in fields.items()}


def lost(config: Any, read: Any) -> list[str]:
    """Names of the config's fields that differ in the one read back from a file, and change the model's results."""
    ours, theirs = config.to_dict(), read.to_dict()
    return sorted(
        key for key, value in ours.items() if key in theirs and key not in _NO_MATTER and not _same(value, theirs[key])
    )


_NO_MATTER = {
    *("model_type", "architectures", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"),  # elsewhere in the file
    *("attention_dropout", "initializer_range", "pretraining_tp", "max_window_layers", "_sliding_window_pattern"),
}


def _same(one: Any, two: Any) -> bool:
    """Whether two values are equal, numbers to float32's precision."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, float | int) and isinstance(two, float | int):
        return math.isclose(one, two, rel_tol=1e-6)
    return bool(one == two)


def write_tokenizer(file: GgufFile, config: Any, out: Path, name: str) -> None:
    """Writes tokenizer and generation config, with the file's BOS and end-of-turn tokens.

    Raises CheckpointError, BudgetError."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    template = file.fields.text("tokenizer.chat_template")
    alone = out / "alone.gguf"  # transformers would take another model's tokenizer.json that lies beside the file
    alone.symlink_to(file.path.absolute())
    try:
        # Not AutoTokenizer, which gives the same but first reads the whole header again, slowly.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone.parent, gguf_file=alone.name)
    except Exception as error:  # many libraries, many exceptions
        raise CheckpointError(f"the tokenizer in {name} cannot be used: {one_line(error)}") from error
    finally:
        alone.unlink()
    tokenizer.model_max_length = config.max_position_embeddings
    split_as(tokenizer.backend_tokenizer, file.fields)
    header = file.fields.of("tokenizer.ggml.")
    pre = header.text("pre")
    by_default = header.text("model") == "llama" or ALIASES.get(pre, pre) in BOS_BY_DEFAULT
    add_bos = header.flag("add_bos_token", by_default)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    adds_bos = bool(bos) and (add_bos or tokenizer.encode("a")[:1] == [bos_id])
    adds_eos = header.flag("add_eos_token") and tokenizer.eos_token is not None
    if adds_eos or (adds_bos and tokenizer.encode("a")[:1] != [bos_id]):
        before, after = f"{bos} " if adds_bos else "", f" {tokenizer.eos_token}" if adds_eos else ""
        ids = {tokenizer.eos_token: tokenizer.eos_token_id} if adds_eos else {}
        ids |= {bos: bos_id} if adds_bos else {}
        one, two = f"{before}$A{after}", f"{before}$B{after}"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=one, pair=f"{one} {two}", special_tokens=[*ids.items()]
        )
    try:
        tokenizer.save_pretrained(out)
    except Exception as error:  # a plain one, with the system's message
        raise BudgetError(f"{name}: its tokenizer cannot be written ({error}); is the disk full?") from error

    vocabulary = tokenizer.get_vocab()
    ends = [header.whole("eos_token_id", LEAST_ID), header.whole("eot_token_id", LEAST_ID)]
    ends += [vocabulary[token] for token in END_OF_TURN if token in vocabulary and token in template]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    eos = unique if len(unique) > 1 else next(iter(unique), None)
    generation = GenerationConfig(bos_token_id=bos_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    generation.save_pretrained(out)
