"""Weights that other tools quantized: each format against the dense weights that it stands for, bit for bit, and whole
models against the oracle on these."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import torch
from engines import assert_equals_oracle, copying, greedy
from quantized import MAKERS, pack, quantized_checkpoint, quantized_experts, quantized_mixture, quantized_wrapper
from safetensors.torch import load_file, save_file
from tiny import tiny_prompt
from transformers import AutoModelForCausalLM

from griffin_offload import Engine
from griffin_offload.checkpoint.headers import Packed
from griffin_offload.checkpoint.parts import part, unit
from griffin_offload.checkpoint.parts import pieces as parts_of
from griffin_offload.checkpoint.quantized import decode
from griffin_offload.checkpoint.quantized.bits import to_float, unpack
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.errors import CheckpointError, UnsupportedArchitecture
from griffin_offload.model.compute_dtype import TOLD, compute_dtype
from griffin_offload.model.pretrained import read_headers

PROMPT, NEW = tiny_prompt(), 12
KINDS = [*MAKERS, "mxfp4"]


def made(folder: Path, kind: str) -> tuple[Path, Path]:
    return quantized_experts(folder) if kind == "mxfp4" else quantized_checkpoint(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [2**19, 700])
def test_each_weight_is_the_one_that_it_stands_for(
    tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, and a few rows at a time past the page cache; the bytes read are those of the file."""
    monkeypatch.setattr(decode, "CHUNK", chunk)
    folder, dense = made(tmp_path, kind)
    expected = load_file(dense / "model.safetensors")
    checkpoint = read_headers(folder).checkpoint
    reader = Reader(direct=chunk == 700)
    for name, info in checkpoint.tensors.items():
        if name in expected:
            target = torch.full(info.shape, torch.nan)
            reader.read({info: target})
            assert torch.equal(target, expected[name]), name
    assert expected.keys() <= checkpoint.tensors.keys()
    stored = load_file(folder / "model.safetensors")
    unread = ("weight_shape", "weight_format", "activation_scale", "input_scale", "bitsandbytes__nf4")
    assert reader.bytes == sum(t.nbytes for name, t in stored.items() if not name.endswith(unread))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_answers_as_the_dense_one(tmp_path: Path, kind: str) -> None:
    folder, dense = made(tmp_path, kind)
    for sparsity in (0.0, 0.5):
        assert_equals_oracle(dense, PROMPT, sparsity, Engine(folder, dtype="float32"), NEW)


@pytest.mark.parametrize("kind", ["gptq", "awq", "bnb-4"])
def test_float16_of_a_quantized_checkpoint_is_bfloat16_on_a_cpu(tmp_path: Path, kind: str) -> None:
    """Where products in float16 are many times slower. The report says so; what is asked for is taken."""
    folder, dense = made(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    engine = Engine(folder)
    assert engine.dtype == "bfloat16"
    answer, _ = greedy(engine, PROMPT, 0.5, NEW)
    assert answer.token_ids == greedy(Engine(dense, dtype="bfloat16"), PROMPT, 0.5, NEW)[0].token_ids
    assert answer.report.overridden == (TOLD,)
    asked = Engine(folder, dtype="float16")
    assert (asked.dtype, asked.opened.overridden) == ("float16", ())
    checkpoint = read_headers(folder).checkpoint
    assert compute_dtype(checkpoint, "cuda") == (torch.float32, []), "that of the other tensors here"


@pytest.mark.parametrize("options", [{}, {"resident_dtype": "int8"}])
def test_a_quantized_embedding_and_lm_head(tmp_path: Path, options: dict[str, str]) -> None:
    """They are held whole: their rows are not read one by one."""
    folder, dense = quantized_checkpoint(tmp_path, "fp8", outer=True)
    ours, plain = Engine(folder, dtype="float32"), Engine(dense, dtype="float32")
    assert not ours.skeleton.layout.embedding_on_disk
    for sparsity in (0.0, 0.5):
        answers = [
            e.generate(PROMPT, sparsity=sparsity, max_new_tokens=NEW, do_sample=False, **options) for e in (ours, plain)
        ]
        if not options:  # int8 leaves the lm_head of one as it is, and rounds the other's
            assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("kind", ["fp8", "compressed-int4", "gptq"])
def test_the_experts_of_a_mixture_are_put_together(tmp_path: Path, kind: str) -> None:
    folder, dense = quantized_mixture(tmp_path, kind)
    model = oracle.load(dense)
    for sparsity in (0.0, 0.5):
        kept = oracle.experts(model, PROMPT, sparsity) if sparsity else None
        expected = oracle.masked_generate(model, PROMPT, kept, NEW)[0]
        assert greedy(Engine(folder, dtype="float32"), PROMPT, sparsity, NEW)[0].token_ids == expected


@pytest.mark.parametrize("kind", ["fp8-tensor", "bnb-8"])
def test_the_text_model_of_a_quantized_wrapper(tmp_path: Path, kind: str) -> None:
    folder, dense = quantized_wrapper(tmp_path, kind)
    ours, plain = Engine(folder, dtype="float32"), Engine(dense)
    assert greedy(ours, PROMPT, 0.5, NEW)[0].token_ids == greedy(plain, PROMPT, 0.5, NEW)[0].token_ids
    assert ours.opened.checkpoint.bytes < plain.opened.checkpoint.bytes
    ours.export(PROMPT, tmp_path / "out", prompt_text="x", sparsity=0.5, fold=False)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq", "bnb-4", "mxfp4"])
def test_a_device_gets_the_weights_in_parts(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where several threads read and decode parts of a weight."""
    monkeypatch.setattr("griffin_offload.memory.upload.PIECE", 2**15)
    folder, dense = made(tmp_path, kind)
    assert_equals_oracle(dense, PROMPT, 0.5, copying(folder, dtype="float32"), NEW)


@pytest.mark.parametrize("kind", KINDS)
def test_each_byte_is_read_once_by_threads_that_take_parts(tmp_path: Path, kind: str) -> None:
    folder, dense = made(tmp_path, kind)
    expected = load_file(dense / "model.safetensors")
    checkpoint = read_headers(folder).checkpoint
    wanted = {info: torch.full(info.shape, torch.nan) for info in checkpoint.tensors.values() if info.name in expected}
    work = parts_of(wanted, {}, 2**14)
    assert len(work) > 2 * len([info for info in wanted if info.encoding]), "several parts of a weight"
    reader = Reader()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda parts: reader.read({each.info: each.target for each in parts}), work))
    assert reader.bytes == sum(info.all_bytes for info in wanted)
    for info, tensor in wanted.items():
        assert torch.equal(tensor, expected[info.name]), info.name


@pytest.mark.parametrize("kind", ["fp8", "gptq"])
def test_an_export_is_dense_and_says_so(tmp_path: Path, kind: str) -> None:
    folder, _ = made(tmp_path, kind)
    Engine(folder).export(PROMPT, tmp_path / "out", prompt_text="x", sparsity=0.5, fold=False)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    _, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(facts.values()), facts


def test_the_plan_counts_dense_weights_and_what_decoding_takes(tmp_path: Path) -> None:
    folder, dense = made(tmp_path, "gptq")
    ours, plain = Engine(folder, dtype="float32"), Engine(dense, dtype="float32")
    assert ours.sizes == plain.sizes
    packed = [info.encoding for info in ours.opened.checkpoint.tensors.values() if isinstance(info.encoding, Packed)]
    assert ours.opened.converts - plain.opened.converts >= decode.scratch(packed) > 0


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers finds one, it multiplies such weights as they are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("_no_gpu")
def test_transformers_dequantizes_fp8_to_the_same(tmp_path: Path) -> None:
    """transformers has blocks of whole sizes alone, and dequantizes on a CPU by itself."""
    folder, dense = made(tmp_path, "fp8")
    theirs = oracle.load(folder)
    for name, tensor in oracle.load(dense).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


@pytest.mark.usefixtures("_no_gpu")
def test_transformers_dequantizes_mxfp4_to_the_same(tmp_path: Path) -> None:
    folder, dense = made(tmp_path, "mxfp4")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in oracle.load(dense).state_dict().items():
        if name.endswith("_proj") and "experts" in name:
            assert torch.equal(theirs.state_dict()[name], tensor.bfloat16()), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_part_is_where_it_belongs(tmp_path: Path, kind: str) -> None:
    folder, dense = made(tmp_path, kind)
    expected = load_file(dense / "model.safetensors")
    checkpoint = read_headers(folder).checkpoint
    for name, info in checkpoint.tensors.items():
        if isinstance(info.encoding, Packed):
            size, units = unit(info), decode.units(info.encoding)
            middle = part(info, units // 4 * size, units * size)
            inner = part(middle, units // 4 * size, units // 2 * size)
            target = torch.full(inner.shape, torch.nan)
            Reader().read({inner: target})
            begin = 2 * (units // 4) * size
            assert torch.equal(target, expected[name].flatten()[begin : begin + len(target)]), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_every_number_of_8_bits_is_widened_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    finite = numbers[numbers.float().isfinite()]
    for some in (numbers, finite):
        assert torch.equal(to_float(some).nan_to_num(7), some.float().nan_to_num(7))
        assert torch.equal(to_float(some).signbit(), some.float().signbit())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_of_few_bits_come_out_of_words_as_they_went_in(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (6, 64))
    assert torch.equal(unpack(pack(numbers, bits, 1), bits).long(), numbers)


# What is not read


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"quant_method": "hqq"}, ["'hqq'", "GGUF"]),
        ({"quant_method": "gptq", "bits": 3}, ["3 bits"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["marlin"]),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, ["down"]),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ["gemv"]),
        (
            {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": {"a": {}}},
            ["mxfp8"],
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, ["transform"]),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, ["sparse-24"]),
    ],
)
def test_other_forms_are_refused_with_the_way_out(tmp_path: Path, facts: object, words: list[str]) -> None:
    folder, _ = made(tmp_path, "awq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(UnsupportedArchitecture) as caught:
        Engine(folder)
    for word in [*words, "original weights"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"quant_method": "fp8", "weight_block_size": "x"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "compressed-tensors", "config_groups": 3},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
        {"quant_method": "gptq", "bits": [4]},
        {"quant_method": ["gptq"]},
    ],
)
def test_a_config_that_is_not_of_the_form_is_an_error_of_one_line(tmp_path: Path, facts: object) -> None:
    folder, _ = made(tmp_path, "awq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises((CheckpointError, UnsupportedArchitecture), match=r"config\.json|quantized"):
        Engine(folder)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gptq", ("scales", lambda t: t[:, :-8].contiguous())),
        ("gptq", ("g_idx", lambda t: t + 1000)),
        ("gptq", ("qzeros", lambda t: t[:1].contiguous())),
        ("awq", ("scales", lambda t: t[:-1].contiguous())),
        ("fp8", ("weight_scale_inv", lambda t: t.repeat(5, 1))),
        ("bnb-4", ("weight.absmax", lambda t: t[:-1].contiguous())),
        ("bnb-4", ("bitsandbytes__nf4", lambda t: t[:-4].contiguous())),
        ("bnb-4", ("bitsandbytes__nf4", lambda t: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8))),
        ("bnb-8", ("SCB", lambda t: t[:-1].contiguous())),
        ("compressed-int4", ("weight_scale", lambda t: t.repeat(1, 200))),
    ],
)
def test_tensors_that_do_not_fit_are_a_damaged_checkpoint(tmp_path: Path, kind: str, change: tuple) -> None:
    folder, _ = made(tmp_path, kind)
    suffix, damage = change
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(suffix) and "layers.1" in name)
    save_file(tensors | {name: damage(tensors[name])}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        Engine(folder).generate(PROMPT, sparsity=0.5, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("kind", "mark"), [("gptq", "qweight"), ("fp8", "weight"), ("compressed-int4", "weight_packed")]
)
def test_a_config_that_does_not_say_how_weights_are_quantized(tmp_path: Path, kind: str, mark: str) -> None:
    folder, _ = made(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"\.{mark}\b.*config\.json does not say how.*quantization_config"):
        Engine(folder)


@pytest.mark.parametrize(("kind", "scale"), [("gptq", "scales"), ("awq", "qzeros"), ("fp8", "weight_scale_inv")])
def test_a_weight_whose_scales_are_missing(tmp_path: Path, kind: str, scale: str) -> None:
    folder, _ = made(tmp_path, kind)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"model.layers.1.mlp.up_proj.{scale}")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*without all the tensors that hold"):
        Engine(folder)
