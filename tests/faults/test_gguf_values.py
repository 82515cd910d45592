"""GGUF headers whose values are of another type than is meant, or lie: one line that names the file."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.mutate import Gguf, gguf_text
from tiny import tiny_checkpoint
from tiny_gguf import write_gguf

from griffin_offload.checkpoint.gguf.values import Values
from griffin_offload.errors import CheckpointError, GriffinError, UnsupportedArchitecture
from griffin_offload.sources.gguf_convert import link

pytestmark = pytest.mark.fault

Value = tuple[int, bytes]


def u32(number: int) -> Value:
    return 4, struct.pack("<I", number)


def f32(number: float) -> Value:
    return 6, struct.pack("<f", number)


def text(words: str) -> Value:
    return 8, gguf_text(words.encode())


def array(element: int, count: int, data: bytes = b"") -> Value:
    return 9, struct.pack("<IQ", element, count) + data


LIST, NAN, DEEP = array(4, 2, struct.pack("<2I", 1, 2)), f32(float("nan")), array(9, 1, struct.pack("<IQ", 9, 1) * 2000)
# Key and value -> what is said of it.
VALUES: dict[str, tuple[str, Value, str]] = {
    "nested_2000_deep": ("a", DEEP, "nested more than 4 deep"),
    "architecture_a_list": ("general.architecture", LIST, "should be a text"),
    "architecture_a_number": ("general.architecture", u32(7), "should be a text"),
    "architecture_escapes": ("general.architecture", text("\x1b[2J"), r"holds a '\\+x1b"),
    "type_a_number": ("general.type", u32(7), "should be a text"),
    "alignment_a_list": ("general.alignment", LIST, "alignment"),
    "alignment_a_text": ("general.alignment", text("32"), "alignment"),
    "alignment_nan": ("general.alignment", NAN, "alignment"),
    "alignment_0": ("general.alignment", u32(0), "alignment 0"),
    "alignment_no_power_of_2": ("general.alignment", u32(48), "alignment 48"),
    "alignment_negative": ("general.alignment", (5, struct.pack("<i", -32)), "alignment -32"),
    "alignment_2_to_63": ("general.alignment", (10, struct.pack("<Q", 2**63)), "alignment"),
    "split_count_a_text": ("split.count", text("2"), "should be a whole number"),
    "split_count_negative": ("split.count", (5, struct.pack("<i", -1)), "should be a whole number"),
    "split_count_many": ("split.count", u32(2**32 - 1), "one of 4294967295 parts"),
    "experts_a_list": ("llama.expert_count", LIST, "should be a whole number"),
    "template_a_number": ("tokenizer.chat_template", u32(7), "should be a text"),
    "template_a_list": ("tokenizer.chat_template", LIST, "should be a text"),
    "eot_a_text": ("tokenizer.ggml.eot_token_id", text("2"), "should be a whole number"),
    "eot_a_list": ("tokenizer.ggml.eot_token_id", LIST, "should be a whole number"),
    "eot_nan": ("tokenizer.ggml.eot_token_id", NAN, "should be a whole number"),
    "eos_a_flag": ("tokenizer.ggml.eos_token_id", (7, b"\1"), "should be a whole number"),
    "bos_2_to_63": ("tokenizer.ggml.bos_token_id", (10, struct.pack("<Q", 2**63)), "should be a whole number"),
    "add_bos_a_text": ("tokenizer.ggml.add_bos_token", text("yes"), "should be true or false"),
    "add_eos_a_list": ("tokenizer.ggml.add_eos_token", LIST, "should be true or false"),
    "model_a_number": ("tokenizer.ggml.model", u32(7), "should be a text"),
    "pre_a_list": ("tokenizer.ggml.pre", LIST, "should be a text"),
    "width_a_text": ("llama.embedding_length", text("32"), "should be a whole number"),
    "width_a_fraction": ("llama.embedding_length", f32(32.5), "should be a whole number"),
    "layers_nan": ("llama.block_count", NAN, "should be a whole number"),
    "heads_0": ("llama.attention.head_count", u32(0), "does not say num_attention_heads"),
    "heads_by_layer_differ": ("llama.attention.head_count", array(4, 2, struct.pack("<2I", 2, 4)), "differs by layer"),
    "context_2_to_63": ("llama.context_length", (10, struct.pack("<Q", 2**63)), "should be a whole number"),
    "epsilon_nan": ("llama.attention.layer_norm_rms_epsilon", NAN, "should be a number"),
    "epsilon_negative": ("llama.attention.layer_norm_rms_epsilon", f32(-1.0), "should be a number"),
    "key_length_a_list": ("llama.attention.key_length", LIST, "should be a whole number"),
    "rope_base_infinite": ("llama.rope.freq_base", f32(float("inf")), "should be a number"),
    "rope_base_a_text": ("llama.rope.freq_base", text("1e4"), "should be a number"),
    "scaling_type_a_number": ("llama.rope.scaling.type", u32(1), "should be a text"),
    "scaling_factor_nan": ("llama.rope.scaling.factor", NAN, "should be a number"),
    "scaling_factor_a_list": ("llama.rope.scaling.factor", LIST, "should be a number"),
    "unknown_type": ("a", (13, b""), "a value of type 13"),
    "text_beyond_the_file": ("a", (8, struct.pack("<Q", 2**40)), "bytes at"),
    "text_of_2_to_63": ("a", (8, struct.pack("<Q", 2**63)), "bytes at"),
    "text_not_utf8": ("a", (8, gguf_text(b"\xff\xfe")), "header cannot be read"),
    "list_beyond_the_file": ("a", array(4, 2**40), "bytes at"),
    "list_of_2_to_64": ("a", array(12, 2**64 - 1), "bytes at"),
    "texts_beyond_the_file": ("a", array(8, 2**40), "header cannot be read"),
    "lists_beyond_the_file": ("a", array(9, 2**40), "header cannot be read"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("gguf")
    return write_gguf(tiny_checkpoint(root / "m", "llama", chat=True), root / "m.gguf").read_bytes()


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "y.gguf").write_bytes(data)
    with pytest.raises(GriffinError, match=match) as caught:
        link(tmp_path / "y.gguf", tmp_path / "out")
    told = str(caught.value)
    assert told.startswith("y.gguf")
    assert told.isprintable()
    assert len(told) < 600
    assert isinstance(caught.value, CheckpointError | UnsupportedArchitecture)


def test_the_file_taken_apart_is_the_file(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "y.gguf").write_bytes(Gguf(whole).to_bytes())
    link(tmp_path / "y.gguf", tmp_path / "out")


@pytest.mark.parametrize("name", VALUES)
def test_values_of_another_type(whole: bytes, tmp_path: Path, name: str) -> None:
    key, value, said = VALUES[name]
    refused(tmp_path, Gguf(whole).set(key, *value).to_bytes(), said)


Tensor = list[Any]
TENSORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "no_dimension": (lambda t: t.__setitem__(1, []), "has 0 dimensions"),
    "five_dimensions": (lambda t: t.__setitem__(1, [1] * 5), "has 5 dimensions"),
    "a_dimension_of_0": (lambda t: t.__setitem__(1, [32, 0]), "has the shape"),
    "dimensions_that_overflow": (lambda t: t.__setitem__(1, [2**32, 2**32, 2]), "is cut off"),
    "type_not_known": (lambda t: t.__setitem__(2, 999), "of the type 999"),
    "offset_beyond_the_file": (lambda t: t.__setitem__(3, 2**40), "is cut off"),
    "offset_of_2_to_64": (lambda t: t.__setitem__(3, 2**64 - 32), "is cut off"),
    "offset_of_another": (lambda t: t.__setitem__(3, t[3] - 32), "overlap"),
    "another_shape": (lambda t: t.__setitem__(1, t[1][::-1]), "has the shape|overlap"),
    "another_name": (lambda t: t.__setitem__(0, b"x\n\x1b[2J"), "lacks 1 of its tensors"),
    "name_not_utf8": (lambda t: t.__setitem__(0, b"\xff"), "header cannot be read"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_lie(whole: bytes, tmp_path: Path, name: str) -> None:
    change, said = TENSORS[name]
    file = Gguf(whole)
    change(next(tensor for tensor in file.tensors if tensor[0] == b"blk.1.ffn_up.weight"))
    refused(tmp_path, file.to_bytes(), said)


@pytest.mark.parametrize(
    ("shape", "kind", "size"), [([5], 0, 20), ([4], 26, 16), ([32], 2, 18), ([2, 2], 0, 16), ([4], 1, 8)]
)
def test_rope_factors_of_another_length_or_type(
    whole: bytes, tmp_path: Path, shape: list[int], kind: int, size: int
) -> None:
    file = Gguf(whole)
    file.tensors.append([b"rope_freqs.weight", shape, kind, len(file.rest)])
    file.rest += bytes(size)
    refused(tmp_path, file.to_bytes(), r"rope_freqs\.weight is .*, not \[4\] of type F32")


def test_rope_factors_of_zeros_are_not_llama_3s(whole: bytes, tmp_path: Path) -> None:
    file = Gguf(whole)
    file.tensors.append([b"rope_freqs.weight", [4], 0, len(file.rest)])
    file.rest += bytes(16)
    refused(tmp_path, file.to_bytes(), r"not Llama 3\.1's")


@pytest.mark.parametrize("more", [(2**63, 0), (0, 2**63), (2**31, 0), (0, 1), (1, 0)], ids=str)
def test_counts_that_lie(whole: bytes, tmp_path: Path, more: tuple[int, int]) -> None:
    refused(tmp_path, Gguf(whole).to_bytes(more=more), "header cannot be read|does not say|of the type|dimensions")


def test_a_key_or_a_tensor_twice(whole: bytes, tmp_path: Path) -> None:
    file = Gguf(whole)
    file.fields.append(file.fields[3])
    refused(tmp_path, file.to_bytes(), "twice")
    file = Gguf(whole)
    file.tensors.append(file.tensors[0])
    refused(tmp_path, file.to_bytes(), "two tensors have one name")


def test_a_list_of_very_many_numbers_is_only_counted(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "y.gguf").write_bytes(Gguf(whole).set("a", *array(0, 2**20, bytes(2**20))).to_bytes())
    link(tmp_path / "y.gguf", tmp_path / "out")


def test_values_are_asked_for_by_type() -> None:
    values = Values({"text": "a", "whole": 7, "number": 0.5, "flag": True, "other": [1]}, "m.gguf")
    assert (values.text("text"), values.whole("whole"), values.number("number")) == ("a", 7, 0.5)
    assert values.flag("flag")
    assert (values.text("x", "y"), values.whole("x"), values.number("x"), values.flag("x")) == ("y", None, None, False)
    for ask in (values.text, values.whole, values.number, values.flag):
        with pytest.raises(CheckpointError, match="its header says other"):
            ask("other")


def test_files_of_another_model_beside_a_gguf_file_are_not_its_tokenizer(whole: bytes, tmp_path: Path) -> None:
    """A folder for downloads: transformers would take the tokenizer.json there, and lose the file's own template."""
    (tmp_path / "y.gguf").write_bytes(whole)
    link(tmp_path / "y.gguf", tmp_path / "alone")
    other = tiny_checkpoint(tmp_path / "other", "llama")
    told = (other / "tokenizer.json").read_text().replace("<s>", "<other>")
    (tmp_path / "tokenizer.json").write_text(told)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<other>", "chat_template": "other"}')
    (tmp_path / "chat_template.jinja").write_text("other")
    link(tmp_path / "y.gguf", tmp_path / "beside")
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "beside" / path.name).read_bytes(), path.name
    assert "other" not in (tmp_path / "beside" / "chat_template.jinja").read_text()
