"""Fields of a GGUF header that change the model: each is applied, or refused by its name."""

from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import oracle
import pytest
from tiny import BOS_ID, EOS_ID, tiny_checkpoint, tiny_prompt
from tiny_gguf import write_gguf
from transformers import AutoTokenizer

from griffin_offload import Engine
from griffin_offload.errors import CheckpointError, UnsupportedArchitecture
from griffin_offload.sources import gguf_convert

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))


def answer(model: Path) -> list[int]:
    engine = Engine(model, dtype="float32", device_memory="8GiB")
    return engine.generate(tiny_prompt(), sparsity=0, max_new_tokens=12, greedy=True).token_ids


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("kind", "fields", "rope"),
    [
        ("llama", {"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 4.0}, LINEAR),
        ("llama", {"ARCH__rope__scaling__factor": 4.0}, LINEAR),
        ("llama", {"ARCH__rope__scale_linear": 4.0}, LINEAR),
        ("qwen2", {"ARCH__rope__scale_linear": 4.0}, LINEAR),
        ("gemma3_text", {"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 4.0}, LINEAR),
        ("llama", {"ARCH__rope__scaling__type": "none", "ARCH__rope__scaling__factor": 4.0}, {}),
        ("llama", {"ARCH__rope__scaling__type": "linear"}, {}),
        (
            "qwen2",
            {
                "ARCH__rope__scaling__type": "yarn",
                "ARCH__rope__scaling__factor": 4.0,
                "ARCH__rope__scaling__original_context_length": 64,
            },
            YARN,
        ),
    ],
)
def test_positions_are_scaled_as_the_header_says(
    tmp_path: Path, kind: str, fields: dict[str, Any], rope: dict[str, Any]
) -> None:
    six = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
    sizes: dict[str, Any] = six if kind == "gemma3_text" else {}
    plain = tiny_checkpoint(tmp_path / "plain", kind, **sizes)
    file = write_gguf(plain, tmp_path / "model.gguf", **fields)
    theta = 10000.0
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, **rope}
    if kind == "gemma3_text":
        own = oracle.load(plain).config.rope_parameters
        parameters = {**own, "full_attention": {**own["full_attention"], **rope}}
    scaled = tiny_checkpoint(tmp_path / "scaled", kind, rope_parameters=parameters, **sizes)
    got = answer(file)
    assert got == oracle.full_generate(oracle.load(scaled), tiny_prompt(), 12)[0]
    assert (got != oracle.full_generate(oracle.load(plain), tiny_prompt(), 12)[0]) == bool(rope)


@pytest.mark.usefixtures("cache")
def test_the_base_of_sliding_layers_is_applied(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "gemma3_text")
    Engine(write_gguf(folder, tmp_path / "model.gguf", ARCH__rope__freq_base_swa=500.0)).skeleton  # noqa: B018
    engine = Engine(tmp_path / "model.gguf")
    assert engine.skeleton.config.rope_parameters["sliding_attention"]["rope_theta"] == 500.0


REFUSED: dict[str, Any] = {
    "rope__scaling__type": "longrope",
    "rope__scaling__attn_factor": 2.0,
    "rope__scaling__yarn_ext_factor": 0.5,
    "rope__scaling__alpha": 1000.0,
    "rope__dimension_count": 4,
    "rope__freq_base_swa": 500.0,
    "attention__value_length": 16,
    "attention__scale": 0.5,
    "attention__causal": False,
    "attention__max_alibi_bias": 8.0,
    "attention__clamp_kqv": 3.0,
    "attention__sliding_window": 16,
    "attention__temperature_scale": 0.1,
    "attention__head_count_kv": [2, 2, 1],
    "feed_forward_length": [96, 64, 96],
    "logit_scale": 0.25,
    "residual_scale": 0.5,
    "embedding_scale": 12.0,
    "final_logit_softcapping": 30.0,
    "use_parallel_residual": True,
    "pooling_type": 3,
    "nextn_predict_layers": 1,
    "something_new": 7,
}
SLIDES = [True, True, False, True, True, False]


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(tmp_path: Path, field: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    file = write_gguf(folder, tmp_path / "model.gguf", **{f"ARCH__{field}": REFUSED[field]})
    with pytest.raises(UnsupportedArchitecture, match=f"llama.{field.replace('__', '.')}.*original safetensors"):
        gguf_convert.link(file, tmp_path / "out")


def test_what_changes_nothing_is_no_matter(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    fields: dict[str, Any] = {
        "rope__dimension_count": 8,
        "attention__value_length": 8,
        "attention__scale": 8**-0.5,
        "attention__causal": True,
        "attention__sliding_window": 4096,
        "attention__clamp_kqv": 0.0,
        "logit_scale": 1.0,
        "expert_count": 0,
        "expert_used_count": 0,
        "vocab_size": 300,
        "tensor_data_layout": "Meta AI original pth",
        "rope__scaling__finetuned": True,
        "something_new": 0,
    }
    file = write_gguf(folder, tmp_path / "m.gguf", **{f"ARCH__{key}": value for key, value in fields.items()})
    gguf_convert.link(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split__no": 1, "split__count": 3}, "one of 3 parts.*--merge"),
        ({"general__type": "adapter"}, "adapter.*merge"),
        ({"adapter__type": "lora"}, "adapter.*merge"),
        ({"general__type": "mmproj"}, "projector.*the model's own file"),
        ({}, "vocabulary and no weights"),
    ],
)
def test_files_that_hold_no_whole_model_are_called_what_they_are(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    writer = ggml.GGUFWriter(tmp_path / "part.gguf", "llama")
    for key, value in fields.items():
        title = key.replace("__", ".")
        writer.add_string(title, value) if isinstance(value, str) else writer.add_uint32(title, value)
    if fields.keys() & {"adapter__type"}:
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=message):
        gguf_convert.link(tmp_path / "part.gguf", tmp_path / "out")


def test_a_big_endian_file_is_called_that(tmp_path: Path) -> None:
    writer = ggml.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=ggml.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitecture, match="big-endian"):
        gguf_convert.link(tmp_path / "big.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "layers", "fine"), [(6, 3, True), (2, 3, False), (3, 6, False), (SLIDES, 6, False)]
)
def test_another_pattern_of_sliding_layers_is_refused(tmp_path: Path, pattern: Any, layers: int, fine: bool) -> None:
    """transformers makes every sixth layer of Gemma 3 a full one."""
    folder = tiny_checkpoint(tmp_path / "m", "gemma3_text", num_hidden_layers=layers, layer_types=None)
    file = write_gguf(folder, tmp_path / "model.gguf", ARCH__attention__sliding_window_pattern=pattern)
    if fine:
        gguf_convert.link(file, tmp_path / "out")
    else:
        with pytest.raises(UnsupportedArchitecture, match="sliding_window_pattern"):
            gguf_convert.link(file, tmp_path / "out")


@pytest.mark.parametrize(("field", "value"), [("pre", "deepseek-coder"), ("model", "t5")])
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path, field: str, value: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    file = write_gguf(folder, tmp_path / "model.gguf", **{f"tokenizer__ggml__{field}": value})
    with pytest.raises(UnsupportedArchitecture, match=f"tokenizer.ggml.{field} '{value}'"):
        gguf_convert.link(file, tmp_path / "out")


@pytest.mark.parametrize("bos", [True, False])
def test_an_eos_behind_the_prompt(tmp_path: Path, bos: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    file = write_gguf(folder, tmp_path / "model.gguf", bos=bos, tokenizer__ggml__add_eos_token=True)
    gguf_convert.link(file, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").encode("Hello")
    assert ids[-1] == EOS_ID
    assert ids.count(EOS_ID) == 1
    assert (ids[0] == BOS_ID) == bos
