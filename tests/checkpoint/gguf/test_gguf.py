"""A GGUF file, read in place or as a safetensors folder: the values of the model that it was made from, and those that
transformers reads."""

import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import BOS_ID, EOS_ID, START_ID, text_paragraph, tiny_checkpoint, tiny_prompt
from tiny_gguf import ARCHITECTURES, Q8, in_place, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from griffin_offload import Engine
from griffin_offload.checkpoint.gguf.link import NOTE
from griffin_offload.checkpoint.key import checkpoint_key
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.checkpoint.safetensors_writer import CheckpointWriter
from griffin_offload.errors import BudgetError, CheckpointError, FetchError, GriffinError, UnsupportedArchitecture
from griffin_offload.model.pretrained import open_checkpoint
from griffin_offload.open_model import OpenModel
from griffin_offload.sources import gguf_convert as gguf
from griffin_offload.sources import resolve as models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gguf") / "llama", "llama", chat=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_gets_its_own_values_back(model_type: str, tmp_path: Path, out: Path) -> None:
    # transformers reads no head_dim from Qwen 3's files, and takes 128
    more: dict[str, Any] = {"head_dim": 128} if model_type == "qwen3" else {}
    folder = tiny_checkpoint(tmp_path / model_type, model_type, **more)
    file = write_gguf(folder, tmp_path / "model.gguf")
    gguf.convert(file, out)

    source, made = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    linked = in_place(file, tmp_path / "linked", torch.float32)
    assert made.keys() == source.keys() == linked.keys()
    for key, tensor in made.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[key].to(torch.bfloat16)), f"{key}: not what transformers reads"
        assert torch.equal(linked[key], theirs[key]), f"{key}: not what transformers reads"
        if "norm" not in key:  # 1 + w - 1 is not w in float32
            assert torch.equal(tensor, source[key].to(torch.bfloat16)), key
    said = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name).to_dict()
    ours = AutoConfig.from_pretrained(out).to_dict()
    own = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "unk_token_id", "head_dim"}
    own |= {"query_pre_attn_scalar"}  # transformers takes 256, whatever the file's head_dim; llama.cpp takes that
    assert {key: ours.get(key) for key in said.keys() - own} == {key: said[key] for key in said.keys() - own}
    assert ours.get("query_pre_attn_scalar") == getattr(
        AutoConfig.from_pretrained(folder), "query_pre_attn_scalar", None
    )
    assert ours["dtype"] in ("bfloat16", torch.bfloat16)
    assert AutoConfig.from_pretrained(tmp_path / "linked").to_dict() | {"_name_or_path": str(out)} == ours


@pytest.mark.parametrize("kind", [ggml.GGMLQuantizationType[name] for name in ("F16", "BF16", "Q4_0", "Q5_1", "Q8_0")])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_quantised_tensors_as_transformers_reads_them(model_type: str, kind: Any, tmp_path: Path, out: Path) -> None:
    file = write_gguf(tiny_checkpoint(tmp_path / model_type, model_type), tmp_path / "model.gguf", kind=kind)
    told: list[tuple[str, int, int]] = []
    gguf.convert(file, out, on_progress=lambda *event: told.append(event))
    made, linked = load_file(out / "model.safetensors"), in_place(file, tmp_path / "linked", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in linked.items())
    assert all(torch.equal(tensor, theirs[key].bfloat16()) for key, tensor in made.items())
    done = [event[1] for event in told]
    assert done == sorted(done)
    assert done[-1] == told[-1][2]


# An engine over the file, beside one over a folder of the same weights.


def as_transformers_reads(file: Path, out: Path, dtype: str) -> Path:
    """A safetensors folder in `dtype`, of what transformers makes of a GGUF file."""
    gguf.link(file, out)
    (out / NOTE).unlink()
    exact = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tied = set(exact.all_tied_weights_keys)
    tensors = {n: t.to(getattr(torch, dtype)) for n, t in exact.state_dict().items() if n not in tied}
    # Not save_file: tensors where products like them, as the file's are, or float32 sums differ in the last bit.
    with CheckpointWriter(out, {n: tuple(t.shape) for n, t in tensors.items()}, getattr(torch, dtype)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.contiguous())
    return out


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_over_the_file_is_that_over_a_folder(
    model_type: str, kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    source = tiny_checkpoint(tmp_path / model_type, model_type)
    file = write_gguf(source, tmp_path / "model.gguf", kind=ggml.GGMLQuantizationType[kind])
    ours, theirs = Engine(file, dtype=dtype), Engine(as_transformers_reads(file, tmp_path / "folder", dtype))
    assert ours.dtype == theirs.dtype == dtype
    assert ours.skeleton.layout.table == theirs.skeleton.layout.table
    for sparsity in (0.0, 0.5):
        one, two = (engine.sweep(tiny_prompt(), sparsity=sparsity, method="griffin") for engine in (ours, theirs))
        assert torch.equal(one.logits, two.logits)
    sizes = {name: info.bytes for name, info in ours.checkpoint.tensors.items()}
    ours.unload()
    readers: list[Reader] = []
    make = OpenModel.reader
    monkeypatch.setattr(OpenModel, "reader", lambda opened, plan: readers.append(make(opened, plan)) or readers[-1])
    answers = [
        e.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=12, do_sample=False)
        for e in (ours, theirs)
    ]
    assert answers[0].token_ids == answers[1].token_ids
    table = ours.skeleton.layout.table or ""
    assert readers[0].bytes == sum(sizes.values()) - sizes.get(table, 0)  # each other byte once
    assert answers[0].report.checkpoint_bytes == file.stat().st_size
    assert answers[0].report.plan.rows == ours.plan(48, 12, sparsity=0.5, method="griffin").rows
    made = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in made if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in made if "tokenizer" not in path.name) < 20_000


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    source = tiny_checkpoint(tmp_path / "llama", "llama", hidden_size=256, intermediate_size=512)
    file = write_gguf(source, tmp_path / "model.gguf", kind=ggml.GGMLQuantizationType[kind])
    theirs = Engine(as_transformers_reads(file, tmp_path / "folder", "float32"))
    one, two = (e.sweep(tiny_prompt(), sparsity=0.5, method="griffin") for e in (Engine(file, dtype="float32"), theirs))
    assert torch.equal(one.logits, two.logits)
    assert Engine(file).dtype == "bfloat16"


def test_an_export_and_the_calibrations_key(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    file = write_gguf(llama, tmp_path / "model.gguf", kind=Q8)
    ours, theirs = Engine(file), Engine(as_transformers_reads(file, tmp_path / "folder", "bfloat16"))
    for engine, name in ((ours, "a"), (theirs, "b")):
        engine.export(tiny_prompt(), tmp_path / name, prompt_text="x", fold=False, prior="off", sparsity=0.5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "a" / NOTE).exists()

    key = checkpoint_key(ours.checkpoint)
    shutil.rmtree(tmp_path / "cache")
    assert checkpoint_key(Engine(file).checkpoint) == key
    other = write_gguf(llama, tmp_path / "model.gguf", kind=ggml.GGMLQuantizationType.Q4_0)
    assert checkpoint_key(Engine(other).checkpoint) != key


def test_a_file_that_is_gone_or_another_is_one_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    file = write_gguf(llama, tmp_path / "model.gguf", kind=Q8)
    folder, engine = models.resolve(file), Engine(file)
    assert models.resolve(folder) == folder
    Engine(folder).sweep(tiny_prompt())
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="has changed since the model was opened"):
        engine.sweep(tiny_prompt())
    with pytest.raises(CheckpointError, match=r"has changed since .* give the file itself"):
        Engine(folder)
    with pytest.raises(CheckpointError, match="is cut off"):
        Engine(file)
    file.unlink()
    with pytest.raises(CheckpointError, match="which holds the weights, cannot be opened"):
        Engine(folder)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        engine.sweep(tiny_prompt())
    file.write_bytes(data)
    os.utime(file, ns=(0, 0))
    with pytest.raises(CheckpointError, match="has changed since"):
        Engine(folder)
    assert Engine(file).path != folder


def test_a_note_in_somebody_elses_folder_is_not_believed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    file = write_gguf(llama, tmp_path / "secret.gguf")
    trap = tmp_path / "fetched"
    shutil.copytree(models.resolve(file), trap)
    assert models.gguf_link(trap) is None
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        Engine(trap)
    shutil.copy(llama / "model.safetensors", trap)
    assert {info.file.name for info in open_checkpoint(trap).tensors.values()} == {"model.safetensors"}
    (tmp_path / "cache" / "gguf" / "link").symlink_to(trap)
    assert models.gguf_link(tmp_path / "cache" / "gguf" / "link") is None


def test_types_that_cannot_be_read_are_named(llama: Path, tmp_path: Path, out: Path) -> None:
    data = write_gguf(llama, tmp_path / "model.gguf", kind=Q8).read_bytes()
    place = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    assert struct.unpack_from("<I", data, place) == (Q8,)
    for number, said in ((9, "type Q8_1, which cannot be unpacked; use a file of"), (999, "of the type 999")):
        (tmp_path / "other.gguf").write_bytes(data[:place] + struct.pack("<I", number) + data[place + 4 :])
        with pytest.raises(UnsupportedArchitecture, match=said) as caught:
            gguf.link(tmp_path / "other.gguf", out)
        assert str(caught.value).startswith("other.gguf: ")
        assert not out.exists()


@pytest.mark.parametrize("bos", [True, False])
def test_the_tokenizer_is_the_same(llama: Path, tmp_path: Path, out: Path, bos: bool) -> None:
    gguf.convert(write_gguf(llama, tmp_path / "model.gguf", bos=bos), out)
    ours, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(llama)
    text = text_paragraph() + "\n\n 2024 déjà 漢字 🙂\t"
    ids = ours.encode(text)
    assert ids == original.encode(text)[0 if bos else 1 :]
    assert (ids[0] == BOS_ID) is bos
    assert ours.decode(ids, skip_special_tokens=True) == text
    assert ours.encode("<|start|>user", add_special_tokens=False)[0] == START_ID
    talk = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(talk, tokenize=False) == original.apply_chat_template(talk, tokenize=False)
    assert ours.model_max_length == 256


def test_bos_is_added_where_the_file_is_silent_and_its_tokenizer_does(llama: Path, tmp_path: Path, out: Path) -> None:
    """llama.cpp gives Llama 3's vocabulary a BOS when the file says nothing; transformers' reader does not."""
    file = write_gguf(llama, tmp_path / "model.gguf", tokenizer__ggml__pre="llama-bpe")
    data = file.read_bytes()
    file.write_bytes(data.replace(b"tokenizer.ggml.add_bos_token", b"tokenizer.ggml.not_bos_token"))
    gguf.convert(file, out)
    assert AutoTokenizer.from_pretrained(out).encode("Hello")[0] == BOS_ID


def test_the_end_of_turn_ends_generation(llama: Path, tmp_path: Path, out: Path) -> None:
    file = write_gguf(
        llama, tmp_path / "model.gguf", tokenizer__ggml__eos_token_id=0, tokenizer__ggml__eot_token_id=START_ID
    )
    gguf.convert(file, out)
    generation = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert generation.eos_token_id == [0, START_ID, EOS_ID]  # the file's two, and <|end|>, which the template writes


def test_llama_3_position_scaling_comes_back(llama: Path, tmp_path: Path, out: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = tiny_checkpoint(tmp_path / "llama", "llama", rope_parameters=rope, head_dim=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    frequencies = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    factors = (frequencies / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    gguf.convert(write_gguf(folder, tmp_path / "model.gguf", extra=("rope_freqs.weight", factors)), out)
    back = AutoModelForCausalLM.from_pretrained(out)
    assert back.config.rope_parameters == rope
    assert torch.equal(back.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)

    other = factors * np.linspace(1, 2, len(factors), dtype=np.float32)
    file = write_gguf(folder, tmp_path / "other.gguf", extra=("rope_freqs.weight", other))
    with pytest.raises(UnsupportedArchitecture, match=r"not Llama 3\.1's"):
        gguf.convert(file, tmp_path / "other")


def test_what_a_conversion_would_get_wrong_is_refused(llama: Path, tmp_path: Path, out: Path) -> None:
    cases: list[tuple[dict[str, Any], type[GriffinError], str]] = [
        ({"ARCH__rope__scaling__type": "yarn"}, UnsupportedArchitecture, "scales its positions"),
        ({"ARCH__expert_count": 8}, UnsupportedArchitecture, "mixture of experts"),
        ({"split__count": 3}, CheckpointError, "one of 3 parts.*gguf-split --merge"),
        ({"extra": ("blk.0.attn_q.bias", np.zeros(32, np.float32))}, UnsupportedArchitecture, "blk.0.attn_q.bias"),
        ({"without": "blk.1.ffn_up.weight"}, CheckpointError, "lacks 1 of its tensors, such as blk.1.ffn_up.weight"),
    ]
    for number, (changes, error, message) in enumerate(cases):
        file = write_gguf(llama, tmp_path / f"{number}.gguf", **changes)
        with pytest.raises(error, match=message):
            gguf.convert(file, out)
        shutil.rmtree(out, ignore_errors=True)


def test_other_architectures_are_named(tmp_path: Path, out: Path) -> None:
    writer = ggml.GGUFWriter(tmp_path / "phi.gguf", "phi3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitecture, match="holds a 'phi3' model; GGUF files of llama, qwen2"):
        gguf.convert(tmp_path / "phi.gguf", out)


@pytest.fixture(scope="module")
def bytes_of_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(llama, tmp_path_factory.mktemp("bytes") / "model.gguf").read_bytes()


def test_damaged_files_are_one_line(bytes_of_llama: bytes, tmp_path: Path, out: Path) -> None:
    good, file = bytes_of_llama, tmp_path / "bad.gguf"
    key = good.index(b"llama.block_count") + len("llama.block_count") + 4
    damaged = {
        "cut off in the data": good[:-10],
        "cut off in the header": good[:1000],
        "a few bytes": good[:7],
        "another format": b"PK\x03\x04" + good[4:],
        "version 1": good[:4] + struct.pack("<I", 1) + good[8:],
        "2**60 tensors": good[:8] + struct.pack("<Q", 2**60) + good[16:],
        "2**60 fields": good[:16] + struct.pack("<Q", 2**60) + good[24:],
        "a key of 2**60 bytes": good[:24] + struct.pack("<Q", 2**60) + good[32:],
        "no layers": good[:key] + struct.pack("<I", 0) + good[key + 4 :],
        "2**31 layers": good[:key] + struct.pack("<I", 2**31) + good[key + 4 :],
        "a layer less": good[:key] + struct.pack("<I", 2) + good[key + 4 :],
    }
    for what, data in damaged.items():
        file.write_bytes(data)
        with pytest.raises((CheckpointError, UnsupportedArchitecture)) as caught:
            gguf.convert(file, out)
        assert "bad.gguf" in str(caught.value), what
        assert "\n" not in str(caught.value), what
        shutil.rmtree(out, ignore_errors=True)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        gguf.convert(file, out)


def test_random_damage_to_the_header_never_escapes(bytes_of_llama: bytes, tmp_path: Path, out: Path) -> None:
    """One byte changed anywhere in the header: an error of ours, or a file that is still read; never a traceback."""
    generator, file = np.random.default_rng(0), tmp_path / "bad.gguf"
    for position in generator.integers(4, 1500, 60):
        data = bytearray(bytes_of_llama)
        data[position] ^= int(generator.integers(1, 256))
        file.write_bytes(data)
        with suppress(CheckpointError, UnsupportedArchitecture, BudgetError):
            gguf.convert(file, out)
        shutil.rmtree(out, ignore_errors=True)


def test_a_conversion_asks_for_memory_and_disk_first(
    llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    with monkeypatch.context() as patch:
        memory = psutil.virtual_memory()._replace(available=100_000, free=100_000)
        patch.setattr(psutil, "virtual_memory", lambda: memory)
        with pytest.raises(BudgetError, match=r"converting model.gguf needs .* of memory and .* is available"):
            gguf.convert(file, out)
        shutil.rmtree(out)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(BudgetError, match=r"model.gguf as bfloat16 needs .* of disk and .* has 1.00 MiB free"):
            gguf.convert(file, out)
    assert not list(out.glob("*.safetensors"))


def test_a_folder_is_made_once_even_by_two_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    file = write_gguf(llama, tmp_path / "model.gguf")
    assert models.find(file) is None
    honest, made = gguf.link, list[Path]()

    def link(path: Path, out: Path) -> None:
        made.append(path)
        honest(path, out)

    monkeypatch.setattr(gguf, "link", link)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: models.resolve(str(file)), range(2))
    assert one == two == models.find(file)
    assert made == [file]
    assert [path.name for path in one.parent.iterdir() if not path.name.endswith(".lock")] == [one.name]
    assert [(model.name, model.path) for model in models.local_models()] == [(str(file), one)]
    assert models.origin(one) == str(file)
    assert models.weight_files(one) == [file]

    os.utime(file, ns=(0, 0))  # another file by now, for all that can be known without reading it
    assert models.find(file) is None
    assert models.local_models() == []


def test_a_killed_process_leaves_nothing_in_the_way(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))
    file = write_gguf(llama, tmp_path / "model.gguf")
    folder = models.resolve(file)
    (folder / NOTE).write_text((folder / NOTE).read_text()[:-9])  # as if it had been renamed too early
    partial = folder.with_name(".griffin-0a1b2c3d.tmp")
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "config.json").write_bytes(b"half")
    (partial / ".griffin-lock").touch()  # which its process held
    assert models.find(file) is None
    assert models.resolve(file) == folder
    assert not partial.exists()
    assert models.gguf_link(folder)


def test_a_cache_that_cannot_be_written_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"cannot be made .*GRIFFIN_CACHE=FOLDER names another place"):
        models.resolve(write_gguf(llama, tmp_path / "model.gguf"))


def test_a_disk_that_fills_up_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    """A real failed write, by the system's limit on the size of a file."""
    file = write_gguf(llama, tmp_path / "model.gguf")
    script = """
import resource, signal, sys
from griffin_offload.sources import resolve
from griffin_offload.errors import BudgetError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
try:
    resolve.resolve(sys.argv[1])
except BudgetError as error:
    print(error)
"""
    environment = {**os.environ, "GRIFFIN_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", script, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert "is the disk full?" in result.stdout, result.stderr
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.real
def test_smollm2s_tokenizer(smol: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(start) == 3  # system, user, assistant
    assert ids.count(end) == 2
    assert tokenizer.encode("<|im_start|>user")[0] == start
    assert _round_trips(tokenizer)
    assert AutoConfig.from_pretrained(smol).dtype == torch.bfloat16


@pytest.mark.real
def test_gemmas_tokenizer_puts_a_bos(gemma: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]
    assert _round_trips(tokenizer)
    assert AutoConfig.from_pretrained(gemma).dtype == torch.bfloat16


def _round_trips(tokenizer: Any) -> bool:
    text = text_paragraph() + "\n\n 2024 déjà 漢字 🙂\t  "
    return bool(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text)
