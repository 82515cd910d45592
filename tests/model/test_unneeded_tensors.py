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
from tiny_wrappers import tiny_wrapper
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.errors import CheckpointError
from griffin_offload.units import format_bytes

LAST, WORDS = "model.layers.2.", "layers that draft further tokens"


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


def heads_of_their_own(tensors: dict[str, Tensor]) -> None:
    """As Qwen3.5's and Nemotron's are published."""
    more = {name.replace(LAST, "mtp.layers.0."): tensor.clone() for name, tensor in tensors.items() if LAST in name}
    tensors.update(more | {"mtp.fc.weight": torch.randn(32, 64)})


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "llama", "mixtral"])
@pytest.mark.parametrize(("change", "module"), [(one_more_layer, "model.layers.3"), (heads_of_their_own, "mtp")])
def test_layers_that_draft(tmp_path: Path, kind: str, change: Callable[[dict[str, Tensor]], None], module: str) -> None:
    """They are neither read nor counted, and known by name and size."""
    plain = Engine(tiny_checkpoint(tmp_path / "plain", kind), device_memory="8GiB")
    folder = changed(tiny_checkpoint(tmp_path / "m", kind), change)
    engine = Engine(folder, device_memory="8GiB")
    got = engine.generate(tiny_prompt(), sparsity=0, max_new_tokens=8, greedy=True)
    assert got.token_ids == oracle.full_generate(oracle.load(folder), tiny_prompt(), 8)[0]
    tensors = load_file(folder / "model.safetensors")
    extra = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
    found = engine.opened.extra_layers
    assert found.modules == (module,)
    assert sorted(info.name for info in found.tensors) == sorted(extra)
    assert found.bytes == sum(tensor.nbytes for tensor in extra.values())
    assert got.report.overridden[0] == f"{module} of the files ({format_bytes(found.bytes)}): {WORDS}"
    assert 0 <= got.report.checkpoint_bytes - plain.opened.checkpoint.bytes < 4096  # a longer header
    assert engine.sizes == plain.sizes


def test_layers_that_draft_in_a_wrapper(tmp_path: Path) -> None:
    """The vision tower has more layers than the text model; they are no such layers."""
    tiny_wrapper(tmp_path / "m", "qwen3_5")
    folder = changed(tmp_path / "m", lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(4, 8)}))
    tower = {f"model.visual.blocks.{layer}.norm1.bias": torch.ones(4) for layer in (7, 8)}
    opened = Engine(changed(folder, lambda tensors: tensors.update(tower)), device_memory="8GiB").opened
    assert [info.name for info in opened.extra_layers.tensors] == ["mtp.fc.weight"]
    assert opened.extra_layers.bytes == 128


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
    engine.generate(tiny_prompt(), sparsity=0.5, rest="drop", max_new_tokens=4, greedy=True)
    assert engine.opened.extra_layers.modules == ("mtp",)


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
