"""The key of a checkpoint: the same wherever it lies, another for other weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from griffin_offload.checkpoint.headers import Checkpoint
from griffin_offload.checkpoint.key import checkpoint_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", "llama", shards=2)


def key(folder: Path) -> str:
    return checkpoint_key(Checkpoint.open(folder))


def test_a_checkpoint_keeps_its_key_wherever_it_is(folder: Path, tmp_path: Path) -> None:
    before = key(folder)
    assert len(before) == 64
    shutil.copytree(folder, tmp_path / "copy")
    assert key(tmp_path / "copy") == before
    assert key(folder.rename(tmp_path / "moved")) == before


def test_another_checkpoint_has_another_key(folder: Path, tmp_path: Path) -> None:
    keys = [key(folder)]
    keys.append(key(tiny_checkpoint(tmp_path / "seed", "llama", shards=2, seed=1)))  # other weights, same headers
    keys.append(key(tiny_checkpoint(tmp_path / "dtype", "llama", shards=2, dtype=torch.bfloat16)))
    keys.append(key(tiny_checkpoint(tmp_path / "one", "llama")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    keys.append(key(folder))
    assert len(set(keys)) == len(keys)


def test_a_tensor_of_no_bytes_has_a_key_too(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    before = key(folder)
    tensors = load_file(file)
    save_file({**tensors, "model.empty": torch.zeros(0)}, file)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.empty"] = file.name
    index.write_text(json.dumps(content))
    assert key(folder) != before
