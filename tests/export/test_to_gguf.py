"""An export as a GGUF file: the safetensors export's very tensors, in our own reader and in llama.cpp."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import disk_of, files, left_nothing
from exports import TEXT, load
from safetensors.torch import load_file, save_file
from tiny import BOS, EOS, PAD, text_paragraph, tiny_checkpoint, tiny_prompt
from tiny_gguf import in_place
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from griffin_offload import Engine
from griffin_offload.checkpoint.gguf.config import config_fields, lost, read_config, written_as
from griffin_offload.checkpoint.gguf.header import field_bytes, read_gguf
from griffin_offload.checkpoint.gguf.tokenizer import PRE, as_json
from griffin_offload.checkpoint.gguf.writer import layout
from griffin_offload.errors import ExportError, OptionError, UnsupportedArchitecture
from griffin_offload.export.pruned_model import Export
from griffin_offload.memory.measure import PeakMeter
from griffin_offload.sources import gguf_convert
from griffin_offload.units import MIB
from griffin_offload.version import __version__

SLIDING, FULL = "sliding_attention", "full_attention"
# What a GGUF file cannot say of a tiny model: layers that alternate otherwise than the published models'.
SIX: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": [*[SLIDING] * 5, FULL]}
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": SIX,
}
ODD = "In 2024,\t1234567 people'LL say: it's  fine!\n\n  déjà  vu...\r\n  x3²  漢字 HTMLPage //\n//\n \n "


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gguf") / "llama", "llama", chat=True)


def export(folder: Path, out: Path, dtype: str | None = None, **options: Any) -> Export:
    """As GGUF, where `out` is a file's name."""
    form = "gguf" if out.suffix == ".gguf" else "safetensors"
    return Engine(folder, dtype=dtype).export(
        tiny_prompt(), out, prompt_text=TEXT, format=form, **{"fold": False, "prior": "off", **options}
    )


def both(folder: Path, out: Path, dtype: str | None = None, **options: Any) -> tuple[Path, Path]:
    """The two exports of one prompt: the file, and the folder with as many neurons."""
    types = {key: options.pop(key) for key in ("gguf_type",) if key in options}
    export(folder, out / "m.gguf", dtype, multiple_of=32, **types, **options)
    export(folder, out / "m", dtype, multiple_of=32, **options)
    return out / "m.gguf", out / "m"


def answer(model: Path, sparsity: float = 0.0) -> list[int]:
    return (
        Engine(model)
        .generate(tiny_prompt(), sparsity=sparsity, method="griffin", max_new_tokens=16, do_sample=False)
        .token_ids
    )


# What is written


@pytest.mark.parametrize("kind", TYPES)
def test_our_reader_gets_the_safetensors_exports_tensors(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source", kind, dtype=torch.bfloat16, **TYPES[kind])
    file, plain = both(folder, tmp_path)
    expected = load(plain).state_dict()
    found = in_place(file, tmp_path / "linked", torch.bfloat16)
    assert found.keys() <= expected.keys()
    assert expected.keys() - found.keys() <= {"lm_head.weight"}, "tied"
    for name, tensor in found.items():
        if kind.startswith("gemma") and name.endswith("norm.weight"):  # in the file they are plus one, in float32
            assert torch.allclose(tensor, expected[name], atol=1e-6), name
        else:
            assert torch.equal(tensor, expected[name]), name
    assert answer(file) == answer(plain)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("gguf_type", ["f32", "f16", "q8_0"])
def test_other_types(kind: str, gguf_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source", kind, **TYPES[kind])
    file, plain = both(folder, tmp_path, gguf_type=gguf_type)
    expected, found = load(plain).state_dict(), in_place(file, tmp_path / "linked", torch.float32)
    tolerance = {"f32": 0.0, "f16": 1e-3, "q8_0": 2e-2}[gguf_type]
    for name, tensor in found.items():
        tolerated = max(tolerance, 1e-6) if name.endswith("norm.weight") and kind.startswith("gemma") else tolerance
        assert torch.allclose(tensor, expected[name], atol=tolerated, rtol=tolerated), name
    kinds = {tensor.name: tensor.kind.name for tensor in read_gguf(file, "m").tensors}
    assert {kinds[name] for name in kinds if name.endswith(("norm.weight", ".bias"))} == {"F32"}
    matrices = {kinds[name] for name in kinds if not name.endswith(("norm.weight", ".bias"))}
    assert matrices == {gguf_type.upper()}


def test_rows_that_are_no_whole_blocks_stay_bfloat16(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "m.gguf", gguf_type="q8_0", multiple_of=1)
    kinds = {tensor.name: tensor.kind.name for tensor in read_gguf(tmp_path / "m.gguf", "m").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "BF16"  # 48 columns
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_metadata(tmp_path: Path, llama: Path) -> None:
    exported = export(llama, tmp_path / "m.gguf")
    assert (exported.path, exported.files, exported.backup) == (tmp_path / "m.gguf", ("m.gguf",), None)
    assert exported.bytes == exported.path.stat().st_size
    assert exported.path.stat().st_mode & 0o777 == 0o644
    fields = read_gguf(tmp_path / "m.gguf", "m").fields
    expected = {
        "general.architecture": "llama",
        "general.file_type": 32,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,  # 48, rounded up
        "llama.block_count": 3,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": 300,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "griffin.version": __version__,
        "griffin.sparsity": 0.5,
        "griffin.kept": [64, 64, 64],
        "griffin.neurons": 96,
        "griffin.prompt_tokens": 48,
        "griffin.source_model": "llama",
    }
    assert {key: fields[key] for key in expected} == expected
    assert (
        fields["griffin.prompt_sha256"]
        == json.loads((both(llama, tmp_path / "b")[1] / "griffin.json").read_text())["prompt_sha256"]
    )
    read = Engine(tmp_path / "m.gguf").tokenizer
    original = AutoTokenizer.from_pretrained(llama)
    assert read.chat_template == original.chat_template
    assert read(ODD)["input_ids"] == original(ODD)["input_ids"]


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0, (0.0, 0.5, 0.9)])
def test_other_sparsities_and_unequal_layers(tmp_path: Path, llama: Path, sparsity: Any) -> None:
    """llama.cpp's models of these types have one number of neurons: layers that keep fewer are filled with zeros."""
    file, plain = both(llama, tmp_path, sparsity=sparsity, gguf_type="f32")
    found, expected = in_place(file, tmp_path / "linked", torch.float32), load(plain).state_dict()
    width = 32 if sparsity in (0.9, 1.0) else 96
    assert read_gguf(file, "m").fields["llama.feed_forward_length"] == width
    for name, tensor in found.items():
        same = expected[name]
        if same.shape != tensor.shape:  # of no neurons, the folder has one of zeros, the file a block
            assert sparsity == 1.0
            assert not tensor.any()
            assert not same.any()
        else:
            assert torch.equal(tensor, same), name
    assert answer(file) == answer(plain)


@pytest.mark.parametrize(("multiple", "kept"), [(1, 24), (7, 28), (32, 32), (256, 96)])
def test_multiple_of(tmp_path: Path, llama: Path, multiple: int, kept: int) -> None:
    for out in ("m.gguf", "m"):
        export(llama, tmp_path / out, sparsity=0.75, multiple_of=multiple)
    assert read_gguf(tmp_path / "m.gguf", "m").fields["griffin.kept"] == [kept] * 3
    facts = json.loads((tmp_path / "m" / "griffin.json").read_text())
    assert facts["kept"] == kept
    assert [len(layer) for layer in facts["experts"]] == [kept] * 3
    with pytest.raises(OptionError, match="multiple_of 0 is outside its range"):
        export(llama, tmp_path / "other.gguf", multiple_of=0)


def test_an_export_can_be_exported_again_with_its_own_vocabulary(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "one.gguf", gguf_type="f32")
    export(tmp_path / "one.gguf", tmp_path / "two.gguf", sparsity=0.0, gguf_type="f32")
    one, two = (read_gguf(tmp_path / name, name) for name in ("one.gguf", "two.gguf"))
    for key in one.fields:
        if key.startswith("tokenizer."):
            assert one.raw(key) == two.raw(key)
    assert two.fields["griffin.source_model"] == "one.gguf"
    tensors = [in_place(tmp_path / f"{name}.gguf", tmp_path / name, torch.float32) for name in ("one", "two")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_llama_3_position_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = tiny_checkpoint(tmp_path / "source", "llama", rope_parameters=rope, head_dim=64)
    file, plain = both(folder, tmp_path, gguf_type="f32")
    read = Engine(file, dtype="float32")
    assert read.skeleton.config.rope_parameters == rope
    one, two = (engine.sweep(tiny_prompt(), sparsity=0.0).logits for engine in (read, Engine(plain)))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source", "mistral", sliding_window=100)
    export(folder, tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf", "m").fields["llama.context_length"] == 100


SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 26, "num_key_value_heads": 4}
PUBLISHED: dict[str, dict[str, Any]] = {  # as the config.json of each says what is particular to it
    "llama": {"model_type": "llama", "head_dim": 64, "rms_norm_eps": 1e-5, "mlp_bias": False},
    "mistral 1": {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096},
    "mistral nemo": {"model_type": "mistral", "head_dim": 128, "sliding_window": None, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "rope_scaling": None, "rope_theta": 1000000},
    "gemma2": {"model_type": "gemma2", "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "gemma2 27b": {"model_type": "gemma2", "num_hidden_layers": 46, "head_dim": 128, "query_pre_attn_scalar": 144},
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window": 512,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_of_the_published_configs_is_lost(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(**SIZES | PUBLISHED[name])
    architecture = written_as(config.model_type)
    assert architecture
    tensors = {f"blk.{i}": ((32,), "F32") for i in range(46)}
    tensors["token_embd.weight"] = (config.vocab_size, 32), "F32"
    if not config.tie_word_embeddings:
        tensors["output.weight"] = tensors["token_embd.weight"]
    fields = config_fields(config, architecture)
    laid_out = layout({"general.architecture": architecture, **fields}, tensors)
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(laid_out.header)
        file.truncate(laid_out.bytes)
    read = read_config(read_gguf(tmp_path / "m.gguf", "m"), "m")
    assert lost(config, read) == []
    assert read.tie_word_embeddings == config.tie_word_embeddings
    config.rms_norm_eps = 1e-4
    assert lost(config, read) == ["rms_norm_eps"]


def test_names_and_numbers_that_a_header_takes(tmp_path: Path) -> None:
    fields = {"name": "caf\udce9", "seed": 2**40, "shares": [0.5, 0.25], "flags": [True, False], "words": ["a", "é"]}
    laid_out = layout(fields, {"t": ((32, 32), "Q8_0")})
    (tmp_path / "m.gguf").write_bytes(laid_out.header + bytes(laid_out.bytes - len(laid_out.header)))
    file = read_gguf(tmp_path / "m.gguf", "m")
    assert file.fields == fields | {"name": "caf?", "words": 2, "general.alignment": 64}
    (tensor,) = file.tensors
    assert (tensor.begin, tensor.begin + tensor.bytes) == (laid_out.places["t"][1], laid_out.bytes)
    assert field_bytes("words", ["a", "é"]) == file.raw("words")


# What is refused, before a weight is read


def refused(folder: Path, out: Path, **options: Any) -> str:
    seen: list[int] = []
    with pytest.raises((ExportError, UnsupportedArchitecture)) as caught:
        export(folder, out, on_layer=lambda done, total: seen.append(done), **options)
    assert not seen
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_types_without_a_known_form_are_named(tmp_path: Path) -> None:
    said = refused(tiny_checkpoint(tmp_path / "m", "opt"), tmp_path / "m.gguf")
    assert said.startswith(
        "model type 'opt' cannot be written as GGUF (llama, mistral, qwen2, qwen3, gemma2, gemma3_text"
    )
    assert said.endswith("use --format safetensors")


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, YARN, YARN | {"beta_fast": 20.0}]
)
def test_scaled_positions_are_written(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", rope_parameters=rope)
    export(folder, tmp_path / "m.gguf")
    gguf_convert.convert(tmp_path / "m.gguf", tmp_path / "back")
    assert AutoConfig.from_pretrained(tmp_path / "back").rope_parameters == rope


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama-relu", {}, "hidden_act"),
        ("gemma3_text", {}, "layer_types"),
        ("gemma3_text", SIX | {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "rope_parameters"),
    ],
)
def test_what_a_file_cannot_say_is_named(tmp_path: Path, kind: str, changes: dict[str, Any], said: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind, **changes)
    message = refused(folder, tmp_path / "m.gguf")
    assert said in message
    assert "--format safetensors" in message
    left_nothing(tmp_path, files(tmp_path))


def test_a_splitting_without_a_name_is_refused(tmp_path: Path, llama: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    said = json.loads((folder / "tokenizer.json").read_text())
    for pre in (
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Whitespace"},
    ):
        (folder / "tokenizer.json").write_text(json.dumps(said | {"pre_tokenizer": pre}))
        message = refused(folder, tmp_path / "m.gguf")
        assert "splits texts in a way that has no known name in llama.cpp (known: gpt-2, smollm, llama-bpe" in message
    (folder / "tokenizer.json").write_text(json.dumps(said | {"normalizer": {"type": "Lowercase"}}))
    assert "no known name" in refused(folder, tmp_path / "m.gguf")


def test_numbers_beyond_f16(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "qwen2", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = files(tmp_path)
    with pytest.raises(ExportError, match=r"attn_v.weight holds numbers beyond the range of f16: use the type bf16"):
        export(folder, tmp_path / "m.gguf", gguf_type="f16")
    left_nothing(tmp_path, before)
    export(folder, tmp_path / "m.gguf")


# Where it is written, and what goes wrong on the way


def test_existing_files_and_odd_names(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(ExportError, match=r"mine.gguf exists: give another name, or --force"):
        export(llama, tmp_path / "mine.gguf")
    exported = export(llama, tmp_path / "mine.gguf", force=True)
    assert exported.backup is not None
    assert exported.backup.read_text() == "mine", "it was no export"
    again = export(llama, tmp_path / "mine.gguf", sparsity=0.75, force=True)
    assert again.backup is None
    assert sorted(tmp_path.iterdir()) == sorted([exported.path, exported.backup])
    (tmp_path / "folder.gguf").mkdir()
    engine = Engine(llama)
    for name, said in (("folder.gguf", "is a folder"), ("m.bin", "does not end in .gguf"), ("nul\0.gguf", "no name")):
        with pytest.raises(ExportError, match=said):
            engine.export(
                tiny_prompt(), tmp_path / name, prompt_text=TEXT, fold=False, prior="off", format="gguf", force=True
            )


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupt_leaves_nothing(tmp_path: Path, llama: Path, layer: int, error: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        if done == layer:
            raise error

    (tmp_path / "mine.gguf").write_text("mine")
    for name, force in (("m.gguf", False), ("mine.gguf", True)):
        with pytest.raises(ExportError if error is OSError else error):
            export(llama, tmp_path / name, force=force, on_layer=stop)
        left_nothing(tmp_path, {"mine.gguf": b"mine"})


def test_a_disk_that_becomes_full(tmp_path: Path, llama: Path) -> None:
    for size in (0, 5000, 30_000):
        with disk_of(size), pytest.raises(ExportError, match=r"m.gguf cannot be written.*nothing was left"):
            export(llama, tmp_path / "m.gguf")
        left_nothing(tmp_path, {})


def test_a_disk_that_is_too_small(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    assert "has 98 KiB free; the export needs" in refused(llama, tmp_path / "m.gguf")
    left_nothing(tmp_path, {})


# llama.cpp


def llama_cpp(file: Path, **options: Any) -> Any:
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install '.[bench]')")
    wide = package.GGML_TYPE_F32
    return package.Llama(str(file), n_ctx=128, n_threads=1, type_k=wide, type_v=wide, verbose=False, **options)


@pytest.mark.filterwarnings("ignore")  # llama-cpp-python's own
@pytest.mark.parametrize("kind", TYPES)
def test_llama_cpp_gives_transformers_tokens(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source", kind, **TYPES[kind])
    file, plain = both(folder, tmp_path, gguf_type="f32", sparsity=(0.3, *[0.5] * (5 if kind == "gemma3_text" else 2)))
    model, prompt = load(plain), tiny_prompt()
    runs = llama_cpp(file, logits_all=True)
    runs.eval(prompt)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    rounds = 2e-2 if kind.startswith("gemma") else 2e-3  # llama.cpp looks GELU up in a table of halves
    assert torch.allclose(torch.tensor(runs.scores[: len(prompt)]), logits, atol=rounds, rtol=1e-3)
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
    made = []
    for token in runs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        made.append(token)
        if len(made) == len(tokens):
            break
    assert made == tokens
    runs.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gguf_type", ["bf16", "f16", "q8_0"])
def test_llama_cpp_reads_every_type(gguf_type: str, tmp_path: Path, llama: Path) -> None:
    file, plain = both(llama, tmp_path, gguf_type=gguf_type)
    runs = llama_cpp(file, logits_all=True)
    runs.eval(tiny_prompt())
    with torch.no_grad():
        logits = load(plain)(torch.tensor([tiny_prompt()])).logits[0]
    assert torch.cosine_similarity(torch.tensor(runs.scores[: len(logits)]), logits).min() > 0.98
    assert runs.metadata["griffin.version"] == __version__
    runs.close()


def bytes_tokenizer(pre: str) -> PreTrainedTokenizerFast:
    """Trained on texts that nothing had split, so that its merges go wherever `pre` lets them."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        [ODD * 3, text_paragraph(300), " 12 123 1234 4567\n\n\n  20 'll 's", "!!! ... //"], trainer
    )
    tokenizer.decoder = decoders.ByteLevel()
    said = json.loads(tokenizer.to_str())
    said["pre_tokenizer"] = as_json(PRE[pre])
    said["model"]["ignore_merges"] = pre in ("llama-bpe", "tekken")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def pieces_tokenizer(prefix: str) -> PreTrainedTokenizerFast:
    """As SentencePiece's: of characters, and bytes for what is none of them."""
    alphabet = [*"\u2581etaoinsrhldcumfpgwybv,.'kxTA"]
    pairs = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("i", "n"), ("\u2581", "a"), ("o", "u"), ("in", "g")]
    pairs += [("s", "h"), ("\u2581", "sh"), ("\u2581sh", "e"), ("l", "l"), ("o", "t"), ("\u2581", "\u2581"), ("t", "o")]
    words = [
        PAD,
        BOS,
        EOS,
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *alphabet,
        *("".join(pair) for pair in pairs),
    ]
    model = tokenizer_models.BPE(
        {word: i for i, word in enumerate(words)}, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", "\u2581")
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = (
            replace if prefix == "none" else normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in (PAD, BOS, EOS, "<unk>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **{pre: partial(bytes_tokenizer, pre) for pre in PRE},
    **{f"pieces, {prefix}": partial(pieces_tokenizer, prefix) for prefix in ("none", "space", "metaspace")},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_vocabulary_as_llama_cpp_and_our_reader_have_it(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", vocab_size=910)
    TOKENIZERS[name]().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export(folder, tmp_path / "m.gguf")
    fields = read_gguf(tmp_path / "m.gguf", "m").fields
    assert fields["tokenizer.ggml.tokens"] == 910
    ids = tokenizer(ODD, add_special_tokens=False)["input_ids"]
    if name in PRE:
        assert fields["tokenizer.ggml.pre"] == name
        others = [bytes_tokenizer(other)(ODD)["input_ids"] for other in PRE if other != name]
        assert ids not in others, "the text tells them apart"
    read = Engine(tmp_path / "m.gguf").tokenizer
    assert read(ODD, add_special_tokens=False)["input_ids"] == ids
    assert read(text_paragraph())["input_ids"] == tokenizer(text_paragraph())["input_ids"]
    runs = llama_cpp(tmp_path / "m.gguf", vocab_only=True)
    assert runs.tokenize(ODD.encode(), add_bos=False) == ids
    assert runs.tokenize(text_paragraph().encode(), add_bos=True) == tokenizer(text_paragraph())["input_ids"]
    runs.close()


# The real model


@pytest.mark.real
def test_the_real_model(smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    engine = Engine(smol)
    prompt = engine.encode("Why do people still talk about the Library of Alexandria?")
    meter = PeakMeter("cpu")
    engine.export(prompt, tmp_path / "m.gguf", prompt_text=TEXT, fold=False, prior="off", format="gguf")
    exporting = meter.peak()
    engine.export(prompt, tmp_path / "m", prompt_text=TEXT, fold=False, prior="off")
    held = engine.generate(
        prompt, sparsity=0.5, method="griffin", max_new_tokens=2, do_sample=False
    ).report.measured_peak
    assert exporting + 50 * MIB < held, "the pruned model is never held"
    made = Engine(tmp_path / "m.gguf").generate(prompt, sparsity=0.0, max_new_tokens=24, do_sample=False).token_ids
    assert made == Engine(tmp_path / "m").generate(prompt, sparsity=0.0, max_new_tokens=24, do_sample=False).token_ids
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokens = plain.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    runs, theirs = llama_cpp(tmp_path / "m.gguf"), []
    for token in runs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == len(tokens):
            break
    assert theirs[:8] == tokens[:8]  # beyond, near ties in bfloat16 may fall otherwise
    runs.close()
