"""Tensors that the model does not need refuse no checkpoint; quantized ones that it needs are called that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.errors import CheckpointError

LAST = "model.layers.2."


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


def one_more_layer(tensors: dict[str, Tensor]) -> None:
    """As DeepSeek-V3 and GLM-4.5 have for predicting several tokens."""
    more = {name.replace(LAST, "model.layers.3."): tensor.clone() for name, tensor in tensors.items() if LAST in name}
    more["model.layers.3.eh_proj.weight"] = torch.randn(32, 64)
    tensors.update(more)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "llama", "mixtral"])
def test_a_layer_behind_the_last(tmp_path: Path, kind: str) -> None:
    folder = changed(tiny_checkpoint(tmp_path / "m", kind), one_more_layer)
    engine = Engine(folder, device_memory="8GiB")
    got = engine.generate(tiny_prompt(), sparsity=0, max_new_tokens=8, greedy=True)
    assert got.token_ids == oracle.full_generate(oracle.load(folder), tiny_prompt(), 8)[0]
    assert got.report.overridden[0].startswith("layers 3 to 3 of the files")


def test_a_part_of_a_mixture_behind_the_last(tmp_path: Path) -> None:
    """Too little for transformers' table to make an expert of."""
    name = "model.layers.7.mlp.experts.0.gate_proj.weight"
    folder = changed(tiny_checkpoint(tmp_path / "m", "deepseek_v3"), lambda t: t.update({name: torch.ones(2, 2)}))
    assert Engine(folder, device_memory="8GiB").generate(tiny_prompt(), sparsity=0, max_new_tokens=1).token_ids


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    more = {f"{place}.{dtype}": torch.zeros(10_000).to(dtype) for place in ("mtp.layers.0", "model.layers.0", "x")}
    folder = changed(tiny_checkpoint(tmp_path / "m", "llama"), lambda tensors: tensors.update(more))
    engine = Engine(folder, device_memory="8GiB")
    assert engine.dtype == "float32"
    got = engine.generate(tiny_prompt(), sparsity=0.5, rest="drop", max_new_tokens=4, greedy=True)
    assert got.report.overridden == ()


def test_fewer_layers_than_the_config_asks_for(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match="asks for 4 layers; the files hold 3"):
        Engine(folder)


def packed(tensors: dict[str, Tensor]) -> None:
    """As MLX writes 4 bits."""
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(weight.shape[0], 4, dtype=torch.uint32)


def renamed(tensors: dict[str, Tensor]) -> None:
    """As GPTQ and AWQ name them."""
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.0.mlp.up_proj.qweight"] = weight.to(torch.int32)


@pytest.mark.parametrize("change", [packed, renamed])
def test_quantized_weights_are_called_that(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    folder = changed(tiny_checkpoint(tmp_path / "m", "llama"), change)
    with pytest.raises(CheckpointError, match=r"up_proj.*quantized"):
        Engine(folder)
