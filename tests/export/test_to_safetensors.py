"""An exported folder in plain transformers: the resident pruned model's very weights; and what may go wrong on disk."""

import hashlib
import json
import os
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from disk import disk_of, files, left_nothing
from exports import TEXT, go_on, load
from tiny import TINY, text_paragraph, tiny_checkpoint, tiny_prompt
from transformers import AutoConfig, AutoTokenizer

from griffin_offload import Engine
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.checkpoint.safetensors_writer import CheckpointWriter
from griffin_offload.errors import ExportError, GriffinError, OptionError
from griffin_offload.export import to_safetensors as export_module
from griffin_offload.export.pruned_model import Export
from griffin_offload.memory.measure import PeakMeter
from griffin_offload.model.attention import use_pieces
from griffin_offload.sources.catalogue import CATALOGUE, CatalogueModel
from griffin_offload.units import MIB


@dataclass(frozen=True)
class Swept:
    """The resident pruned model after a sweep: its weights, and what goes on from the prompt."""

    weights: dict[str, torch.Tensor]
    cache: Any
    first: int
    experts: list[list[int]]


def swept(folder: Path, prompt: list[int], sparsity: float = 0.5, dtype: str | None = None) -> Swept:
    engine = Engine(folder, dtype=dtype)
    output = engine.sweep(prompt, sparsity=sparsity, method="griffin")
    weights = {name: tensor.clone() for name, tensor in engine.skeleton.model.state_dict().items()}
    if table := engine.skeleton.layout.table:  # it stays in its file
        weights[table] = oracle.load(folder).state_dict()[table].to(engine.skeleton.layout.dtype)
    experts = [layer[0].tolist() for layer in engine.kept_neurons()]
    return Swept(weights, deepcopy(output.past_key_values), int(output.logits[0, -1].argmax()), experts)


def export(
    folder: Path, out: Path, prompt: list[int] | None = None, dtype: str | None = None, **options: Any
) -> Export:
    prompt = tiny_prompt() if prompt is None else prompt
    return Engine(folder, dtype=dtype).export(
        prompt, out, prompt_text=TEXT, **{"fold": False, "prior": "off", **options}
    )


def assert_equals_resident(folder: Path, out: Path, prompt: list[int], dtype: str | None = None) -> None:
    """The export in `out`, loaded by plain transformers, is the resident pruned model: its bits and its answer."""
    resident, model = swept(folder, prompt, dtype=dtype), load(out)
    state = model.state_dict()
    assert state.keys() == resident.weights.keys()
    for name, tensor in resident.weights.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    generation = Engine(folder, dtype=dtype).generate(
        prompt, sparsity=0.5, method="griffin", max_new_tokens=24, do_sample=False
    )
    if model.dtype != torch.float32:  # torch's kernel rounds otherwise than ours, and near ties fall otherwise
        use_pieces(model)
    assert go_on(model, resident.cache, resident.first, 24) == generation.token_ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("export") / "llama", "llama", chat=True)


# What is written


def test_plain_transformers_loads_the_resident_model(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export(tiny, out)
    assert_equals_resident(tiny, out, tiny_prompt())
    names = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size"}
    size = names.get(tiny.name, "intermediate_size")
    neurons = TINY[tiny.name].get(size) or 4 * 32
    assert getattr(AutoConfig.from_pretrained(out), size) == neurons // 2
    tokenizer, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny)
    assert tokenizer(text_paragraph(50)) == original(text_paragraph(50))
    assert type(tokenizer) is type(original)
    facts = json.loads((out / "griffin.json").read_text())
    assert facts["experts"] == [e.tolist() for e in oracle.experts(oracle.load(tiny), tiny_prompt(), 0.5)]
    assert (facts["kept"], facts["neurons"], facts["sparsity"]) == (neurons // 2, neurons, 0.5)
    assert exported.path == out
    assert set(exported.files) == set(files(out))
    assert exported.bytes == sum(len(content) for content in files(out).values())
    assert exported.backup is None
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt", "starcoder2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_ties(tmp_path: Path, kind: str, tied: bool, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind, tied=tied, dtype=dtype, shards=2)
    export(folder, tmp_path / "out")
    assert_equals_resident(folder, tmp_path / "out", tiny_prompt())
    assert load(tmp_path / "out").dtype == dtype


def test_a_dtype_asked_for(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "out", dtype="bfloat16")
    assert_equals_resident(llama, tmp_path / "out", tiny_prompt(), dtype="bfloat16")
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_a_head_that_differs_from_the_table_though_the_config_ties_them(tmp_path: Path) -> None:
    """The checkpoint holds both, and the sweep reads both: the export must not lose one."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    export(folder, tmp_path / "out")
    assert_equals_resident(folder, tmp_path / "out", tiny_prompt())


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.25, 0.9, 0.99])
def test_other_sparsities(tmp_path: Path, llama: Path, sparsity: float) -> None:
    export(llama, tmp_path / "out", sparsity=sparsity)
    resident, state = swept(llama, tiny_prompt(), sparsity), load(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in resident.weights.items())
    assert load(tmp_path / "out").config.intermediate_size == max(1, int(96 * (1 - sparsity)))


def test_sparsity_0_is_the_original(tmp_path: Path, tiny: Path) -> None:
    export(tiny, tmp_path / "out", sparsity=0.0)
    original, state = oracle.load(tiny).state_dict(), load(tmp_path / "out").state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    experts = json.loads((tmp_path / "out" / "griffin.json").read_text())["experts"]
    assert all(layer == list(range(len(layer))) for layer in experts)


def test_chat_template_and_generation_config_survive(tmp_path: Path, llama: Path) -> None:
    settings = json.loads((llama / "generation_config.json").read_text())
    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.7, "do_sample": True}))
    (folder / "LICENSE").write_text("Be kind.")
    export(folder, tmp_path / "out")
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(llama)
    assert tokenizer.chat_template == original.chat_template is not None
    turns = [{"role": "user", "content": TEXT}]
    assert tokenizer.apply_chat_template(turns) == original.apply_chat_template(turns)
    assert load(tmp_path / "out").generation_config.temperature == 0.7
    assert (tmp_path / "out" / "LICENSE").read_text() == "Be kind."


def test_an_old_template_beside_the_config_survives(tmp_path: Path, llama: Path) -> None:
    """Older checkpoints keep the template in tokenizer_config.json."""
    folder = shutil.copytree(llama, tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    export(folder, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_the_model_card(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    sha = hashlib.sha256(TEXT.encode()).hexdigest()
    assert card.startswith("---\nlibrary_name: transformers\n"), "the hub's front matter"
    assert json.loads((tmp_path / "out" / "griffin.json").read_text())["prompt_sha256"] == sha
    for fact in (
        f"`{llama.name}`",
        "sparsity 0.5",
        sha,
        "How to load",
        "good for, and what not",
        "48 of the 96",
        "48 tokens",
    ):
        assert fact in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(tmp_path / "out")), names)  # it does what it says
    assert names["model"].config.intermediate_size == 48
    assert names["tokenizer"](TEXT)["input_ids"] == AutoTokenizer.from_pretrained(llama)(TEXT)["input_ids"]


def test_the_card_of_a_model_that_is_known_by_an_alias_names_it_as_the_hub_does(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = CatalogueModel(llama.name, "owner/Known-1B", "Apache-2.0", False, 1, {})
    monkeypatch.setitem(CATALOGUE, llama.name, known)
    export(llama, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- source model: `{llama.name}` (owner/Known-1B on the hub, Apache-2.0), whose licence" in card


def test_an_export_can_be_run_and_exported_again(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "one")
    export(tmp_path / "one", tmp_path / "two")
    assert_equals_resident(tmp_path / "one", tmp_path / "two", tiny_prompt())
    assert load(tmp_path / "two").config.intermediate_size == 24


def test_the_engine_works_before_and_after_an_export(tmp_path: Path, llama: Path) -> None:
    engine, prompt = Engine(llama), tiny_prompt()
    before = engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=8, do_sample=False).token_ids
    engine.export(prompt, tmp_path / "one", prompt_text=TEXT, fold=False, prior="off")
    engine.export(prompt, tmp_path / "two", prompt_text=TEXT, fold=False, prior="off")
    assert (
        engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=8, do_sample=False).token_ids == before
    )
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_several_shards(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(CheckpointWriter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, shard=30_000)

    monkeypatch.setattr(export_module, "CheckpointWriter", Small)
    export(llama, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_equals_resident(llama, tmp_path / "out", tiny_prompt())


def test_no_two_threads_use_the_reader(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding is read by the main thread: before the layers', whose reader shares its buffers."""
    pieces, readings = Reader.pieces, []

    def alone(self: Reader, *arguments: Any) -> Any:
        readings.append([thread for thread in threading.enumerate() if thread.name == "griffin-reader"])
        return pieces(self, *arguments)

    monkeypatch.setattr(Reader, "pieces", alone)
    export(llama, tmp_path / "out")
    assert readings == [[]]


def test_progress_by_layer(tmp_path: Path, llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    export(llama, tmp_path / "out", on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_prompt_of_one_token(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "out", tiny_prompt(1))
    assert_equals_resident(llama, tmp_path / "out", tiny_prompt(1))


# Where it is written


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"out exists and is not empty.*--force"):
        export(llama, out)
    assert files(tmp_path) == {"out/sub/mine.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_missing_parents(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(llama, tmp_path / "empty")
    export(llama, tmp_path / "a" / "b" / "c")
    assert files(tmp_path / "empty") == files(tmp_path / "a" / "b" / "c")


def test_a_file_in_the_way(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for force in (False, True):
        with pytest.raises(ExportError, match="file"):
            export(llama, tmp_path / "file", force=force)
        with pytest.raises(ExportError, match="file"):
            export(llama, tmp_path / "file" / "below", force=force)
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["nul\0", "x" * 300])
def test_out_by_an_impossible_name(tmp_path: Path, llama: Path, name: str) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        export(llama, tmp_path / name)
    left_nothing(tmp_path, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ExportError, match="out cannot be written: permission denied"):
        export(llama, tmp_path / "locked" / "out")


def test_force_replaces_an_earlier_export(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "out")
    again = export(llama, tmp_path / "out", sparsity=0.75, force=True)
    assert again.backup is None
    assert load(tmp_path / "out").config.intermediate_size == 24
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_keeps_any_other_folder_as_a_backup(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    exported = export(llama, tmp_path / "out", force=True)
    assert exported.backup is not None
    assert files(exported.backup) == {"mine.txt": b"mine"}
    assert "mine.txt" not in files(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", exported.backup])
    assert json.loads(json.dumps(exported.to_json()))["backup"] == str(exported.backup)


def test_the_model_itself_is_no_output(tmp_path: Path, llama: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    for out, words in ((folder, "of the input"), (folder / "x", "among the model's files"), (tmp_path, "holds")):
        with pytest.raises(GriffinError, match=words):
            export(folder, out, force=True)
    left_nothing(tmp_path, {f"m/{name}": content for name, content in files(llama).items()})


@pytest.mark.parametrize("what", ["nothing", "empty", "full"])
def test_a_link_as_out(tmp_path: Path, llama: Path, what: str) -> None:
    """It is refused, or what it points to is written; nothing is left beside it."""
    target, out = tmp_path / "target", tmp_path / "out"
    out.symlink_to(target)
    if what != "nothing":
        target.mkdir()
    if what == "full":
        (target / "mine.txt").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    try:
        exported = export(llama, out, force=True)
    except ExportError:
        assert {path.name for path in tmp_path.iterdir()} == before
        assert what != "full" or files(target) == {"mine.txt": b"mine"}
    else:
        assert load(out).config.intermediate_size == 48
        kept = {exported.backup.name} if exported.backup else set()
        assert {path.name for path in tmp_path.iterdir()} == before | {"target"} | kept


@pytest.mark.parametrize("name", [".", "../here", "sub/..", "x/../../here"])
def test_out_by_an_odd_name(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It works, or it is refused with nothing left behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        export(llama, Path(name))
    except ExportError:
        assert files(tmp_path) == {}
        assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    else:
        assert load(tmp_path / "here").config.intermediate_size == 48


def test_others_may_read_it(tmp_path: Path, llama: Path) -> None:
    export(llama, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "out").iterdir())


# What goes wrong on the way


@pytest.mark.parametrize("size", [0, 1000, 50_000, 100_000])
def test_a_disk_that_becomes_full(tmp_path: Path, llama: Path, size: int) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    for out, force in ((tmp_path / "out", False), (tmp_path / "here", True)):
        with disk_of(size), pytest.raises(ExportError, match=rf"{out.name} cannot be written.*nothing was left"):
            export(llama, out, force=force)
        left_nothing(tmp_path, {"here/mine.txt": b"mine"})


def test_a_disk_that_is_too_small_is_refused_before_a_weight_is_read(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    seen: list[int] = []
    with pytest.raises(ExportError, match=r"has 98 KiB free; the export needs \d+ MiB"):
        export(llama, tmp_path / "out", on_layer=lambda done, total: seen.append(done))
    assert not seen
    left_nothing(tmp_path, {})


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupt_in_the_sweep_leaves_nothing(
    tmp_path: Path, llama: Path, layer: int, error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        if done == layer:
            raise error

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    engine, threads = Engine(llama), set(threading.enumerate())
    for out, force in ((tmp_path / "out", False), (tmp_path / "here", True)):
        with pytest.raises(ExportError if error is OSError else error):
            engine.export(tiny_prompt(), out, prompt_text=TEXT, fold=False, prior="off", force=force, on_layer=stop)
        left_nothing(tmp_path, {"here/mine.txt": b"mine"})
        assert set(threading.enumerate()) <= threads, "the reader has ended"
    engine.export(tiny_prompt(), tmp_path / "out", prompt_text=TEXT, fold=False, prior="off")  # and it still works
    assert_equals_resident(llama, tmp_path / "out", tiny_prompt())


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_nan_weights_leave_nothing(tmp_path: Path, llama: Path, name: str) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    folder = damaged(shutil.copytree(llama, tmp_path / "m"), poison)
    (tmp_path / "work").mkdir()
    with pytest.raises(GriffinError, match=rf"{name} holds NaN"):
        export(folder, tmp_path / "work" / "out")
    left_nothing(tmp_path / "work", {})


def test_sparsity_out_of_range_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    for sparsity in (-0.1, 1.01, float("nan")):
        with pytest.raises(OptionError):
            export(llama, tmp_path / "out", sparsity=sparsity)
    left_nothing(tmp_path, {})


# The real model


@pytest.mark.real
def test_the_pruned_model_is_never_held(smol: Path, tmp_path: Path) -> None:
    engine = Engine(smol)
    prompt = engine.encode(text_paragraph(60))
    meter = PeakMeter("cpu")
    exported = engine.export(prompt, tmp_path / "out", prompt_text=TEXT, fold=False, prior="off")
    exporting = meter.peak()
    generation = engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False)
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    resident = engine.skeleton.model.state_dict()
    assert exporting + 50 * MIB < generation.report.measured_peak
    assert exported.bytes >= weights > 150 * MIB
    state = load(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in resident.items())
