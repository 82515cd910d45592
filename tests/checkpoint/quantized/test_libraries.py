"""Each format against the library that writes it, where that is installed: bit for bit.

They ran with bitsandbytes 0.50.2, compressed-tensors 0.20.1, GPTQModel 7.7.0 and AutoAWQ 0.2.9 on a CPU. AutoAWQ's
package imports modules that transformers has no more; its file that unpacks is read by itself."""

import json
import warnings
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized import quantized_checkpoint
from safetensors.torch import save_file
from tiny import tiny_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import Engine
from griffin_offload.checkpoint.headers import Checkpoint
from griffin_offload.checkpoint.quantized.find import dense_weights
from griffin_offload.checkpoint.reader import Reader

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS, COLUMNS = 160, 192


def library(name: str) -> Any:
    """A package, or the test is skipped; what it warns of when it is imported is not about Griffin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


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
    bnb = library("bitsandbytes")
    weight = torch.randn(ROWS, COLUMNS, dtype=dtype)
    stored, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    sides = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    expected = bnb.functional.dequantize_4bit(stored, state).to(dtype)
    assert_read_as(tmp_path, {"weight": stored, **sides}, {"load_in_4bit": True}, expected)


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    bnb = library("bitsandbytes")
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
    library("compressed_tensors")
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
    library("compressed_tensors")
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


def quantized_linear(bits: int, symmetric: bool, group: int) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    """A linear module, and for each row and group of its columns a scale and a zero point, (R, G)."""
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    groups = linear.weight.detach().view(ROWS, -1, group)
    scale = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-groups.amin(-1) / scale).round()
    return linear, scale.half().float(), zero.clamp(0, 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, symmetric: bool, ordered: bool, form: str) -> None:
    library("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    linear, scale, zero = quantized_linear(bits, symmetric, 32)
    if form == "gptq" and not symmetric:
        zero = zero.clamp(min=1)  # one is taken from it
    order = (torch.arange(COLUMNS).roll(7) if ordered else torch.arange(COLUMNS)) // 32
    theirs = TorchLinear(bits, 32, symmetric, ordered, COLUMNS, ROWS, register_buffers=True)
    theirs.pack(linear, scale, zero, order.to(torch.int32))
    theirs.eval().post_init()
    expected = theirs.dequantize_weight().T.contiguous()
    if form == "gptq":
        convert_gptq_v2_to_v1_format_module(theirs, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    stored = {name: getattr(theirs, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    assert_read_as(tmp_path, stored, {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}, expected.half())


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_of_gptqmodel(tmp_path: Path, symmetric: bool) -> None:
    library("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    linear, scale, zero = quantized_linear(4, symmetric, 32)
    theirs = AwqTorchLinear(4, 32, symmetric, False, COLUMNS, ROWS)
    theirs.pack(linear, scale.half(), zero)
    stored = {name: getattr(theirs, name) for name in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(*stored.values(), 4, 32)
    assert_read_as(tmp_path, stored, {"quant_method": "awq", "bits": 4}, expected.T.contiguous())


def test_awq_of_autoawq(tmp_path: Path) -> None:
    found = find_spec("awq")
    if found is None or not found.submodule_search_locations:
        pytest.skip("awq is not installed")
    file = Path(found.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = spec_from_file_location("awq_packing", file)
    assert spec
    assert spec.loader
    packing = module_from_spec(spec)
    spec.loader.exec_module(packing)
    stored = {
        "qweight": torch.randint(-(2**31), 2**31, (COLUMNS, ROWS // 8)).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (COLUMNS // 32, ROWS // 8)).int(),
        "scales": torch.rand(COLUMNS // 32, ROWS).half(),
    }
    expected = packing.dequantize_gemm(*stored.values(), 4, 32)
    assert_read_as(tmp_path, stored, {"quant_method": "awq", "bits": 4}, expected.T.contiguous())


GROUPS: dict[str, Any] = {"strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("kind", "packages", "weights"),
    [
        ("compressed-int4", ["compressed_tensors"], GROUPS),
        ("compressed-fp8", ["compressed_tensors"], {"symmetric": True}),
        ("gptq", ["gptqmodel", "optimum"], {}),
        ("awq", ["gptqmodel", "optimum"], {}),
    ],
)
def test_a_model_answers_as_transformers_has_it(
    tmp_path: Path, kind: str, packages: list[str], weights: dict[str, Any]
) -> None:
    """The same checkpoint, with the library's own modules, in float32. What GPTQModel compiles for a CPU takes minutes
    when it is used first."""
    for name in packages:
        library(name)
    folder, _ = quantized_checkpoint(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"].get("config_groups", {}).values():
        group["weights"] |= weights
        config["quantization_config"]["quantization_status"] = "compressed"
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
        ids = torch.tensor([tiny_prompt()])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = Engine(folder, dtype="float32").generate(tiny_prompt(), sparsity=0, max_new_tokens=12, greedy=True)
    assert answer.token_ids == expected[0, len(tiny_prompt()) :].tolist()
