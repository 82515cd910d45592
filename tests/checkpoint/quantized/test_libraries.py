"""Each format against the library that writes it, where that is installed: bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from griffin_offload.checkpoint.headers import Checkpoint
from griffin_offload.checkpoint.quantized.find import dense_weights
from griffin_offload.checkpoint.reader import Reader

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS, COLUMNS = 160, 192


def assert_read_as(folder: Path, stored: dict[str, Any], facts: dict[str, Any], expected: Tensor) -> None:
    tensors = {f"x.{name}": tensor.contiguous() for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    save_file(tensors, folder / "model.safetensors")
    info = dense_weights(Checkpoint.open(folder), facts, expected.dtype).tensors["x.weight"]
    target = torch.full(expected.shape, torch.nan, dtype=expected.dtype)
    Reader().read({info: target})
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_in_4_bits(tmp_path: Path, dtype: torch.dtype, kind: str, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(ROWS, COLUMNS, dtype=dtype)
    stored, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    sides = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    expected = bnb.functional.dequantize_4bit(stored, state).to(dtype)
    assert_read_as(tmp_path, {"weight": stored, **sides}, {"load_in_4bit": True}, expected)


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    stored, scale, _ = bnb.functional.int8_vectorwise_quant(torch.randn(ROWS, COLUMNS, dtype=torch.float16))
    expected = bnb.functional.int8_vectorwise_dequant(stored, scale)
    assert_read_as(tmp_path, {"weight": stored, "SCB": scale}, {"load_in_8bit": True}, expected.float())


INT4: dict[str, Any] = {"num_bits": 4, "type": "int"}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float"}
SCHEMES = [
    ("pack-quantized", {**INT4, "strategy": "group", "group_size": 32}, (1, 32)),
    ("pack-quantized", {**INT4, "strategy": "channel"}, (1, COLUMNS)),
    ("pack-quantized", INT8, (1, COLUMNS)),
    ("int-quantized", INT8, (1, COLUMNS)),
    ("float-quantized", {**FP8, "strategy": "channel"}, (1, COLUMNS)),
    ("float-quantized", {**FP8, "strategy": "tensor"}, (ROWS, COLUMNS)),
    ("naive-quantized", {**FP8, "strategy": "block", "block_structure": [32, 64]}, (32, 64)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("form", "scheme", "block"), SCHEMES)
def test_compressed_tensors(
    tmp_path: Path, dtype: torch.dtype, symmetric: bool, form: str, scheme: dict[str, Any], block: tuple[int, int]
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(ROWS, COLUMNS, dtype=dtype)
    blocks = weight.view(ROWS // block[0], block[0], COLUMNS // block[1], block[1])
    scale = (blocks.abs().amax((1, 3)) / (448 if scheme["type"] == "float" else 2 ** (scheme["num_bits"] - 1) - 1)).to(
        dtype
    )
    stored: dict[str, Tensor] = {"weight": weight, "weight_scale": scale}
    if not symmetric and scheme["type"] == "int":
        stored["weight_zero_point"] = torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    args = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme, symmetric=symmetric))
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(stored, args)
    expected = compressor.decompress(dict(stored), args)["weight"].to(dtype)
    facts = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": {"weights": scheme}}}
    assert_read_as(tmp_path, stored, facts, expected)


@pytest.mark.parametrize(("form", "size"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_fp4(tmp_path: Path, form: str, size: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    groups = weight.view(ROWS, -1, size).float().abs().amax(-1)
    nv = size == 16
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group" if nv else "group", "group_size": size}
    most = (448 * 6 / weight.abs().max().float()).view(1)
    scale = (groups / 6 * most).to(torch.float8_e4m3fn).to(torch.bfloat16) if nv else (groups / 6).log2().ceil().exp2()
    stored: dict[str, Tensor] = {"weight": weight, "weight_scale": scale}
    if nv:
        stored["weight_global_scale"] = most
    args = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme, symmetric=True))
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(stored, args)
    expected = compressor.decompress(dict(stored), args)["weight"]
    facts = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": {"weights": scheme}}}
    assert_read_as(tmp_path, stored, facts, expected)
