"""A refusal names the real cause and the way out."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import CheckpointError, ModelNotFound, OptionError
from griffin_offload.model import tokenizer as tokenizer_module
from griffin_offload.sources.resolve import resolve
from griffin_offload.units import GIB, parse_bytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama") / "m", "llama")


def test_the_hubs_cache_folder_is_its_snapshot(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny"
    snapshot = shutil.copytree(llama, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert resolve(folder) == resolve(str(folder)) == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"not whole.*snapshots/"):
        resolve(folder)


def test_a_folder_of_models_names_one(llama: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"give a folder in it, such as {llama}"):
        resolve(llama.parent)


def test_an_adapter_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match=r"adapter \(LoRA\): merge"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "packages"), [("tokenizer.model", ["sentencepiece", "protobuf"]), ("qwen.tiktoken", ["tiktoken"])]
)
def test_a_tokenizer_names_the_packages_that_read_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packages: list[str]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"\n\x0e\n\x05<unk>")
    config = {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda module: None)
    with pytest.raises(CheckpointError, match=f"{name} is read by.*pip install {' '.join(packages)}.*tokenizer.json"):
        Engine(folder)
    if find_spec("sentencepiece"):  # then the file itself is at fault
        monkeypatch.setattr(tokenizer_module, "find_spec", find_spec)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            Engine(folder)


@pytest.mark.parametrize("text", ["1" * 400 + "GiB", "9" * 5000, "8" * 60 + ".5GB", "9223372036854775808"])
def test_more_memory_than_can_be_counted(text: str) -> None:
    with pytest.raises(OptionError, match="more memory than a machine can have") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 200
    assert parse_bytes("1.5GiB") == 3 * GIB // 2
    with pytest.raises(OptionError, match="not an amount"):
        parse_bytes("x" * 10_000)
