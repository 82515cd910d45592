"""Tiny checkpoints in the forms in which other tools quantize weights, made by the published formulas, one number at a
time where bits are packed; and the dense weights that they stand for.

R rows, C columns, G groups of columns."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint
from tiny_wrappers import tiny_wrapper
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]  # the tensors by suffix, and the dense weight
GROUP = 32
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}


def pack(numbers: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned integers -> words of int32 along an axis, the first one in the lowest bits."""
    numbers = numbers.movedim(axis, -1)
    each = 32 // bits
    words = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // each, dtype=torch.int64)
    for i in range(each):
        words |= numbers[..., i::each].long() << (bits * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, axis).contiguous()


def _scales(weight: Tensor, levels: float, dtype: torch.dtype, group: int = GROUP) -> Tensor:
    """A scale for each group of columns, (R, G)."""
    groups = weight.view(len(weight), -1, group)
    return (groups.abs().amax(-1) / levels + 1e-4).to(dtype)


def _wide(grid: Tensor, group: int = GROUP) -> Tensor:
    return grid.float().repeat_interleave(group, dim=1)


def fp8(weight: Tensor, block: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float32) -> Made:
    """A scale for each block; the last ones may be cut."""
    scale = torch.zeros(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    stored, dense = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = (weight[at].abs().max() / 448).to(dtype).float()
            stored[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            dense[at] = stored[at].float() * scale[i, j]
    return {"weight": stored, "weight_scale_inv": scale.to(dtype)}, dense


def fp8_tensor(weight: Tensor) -> Made:
    """One scale for all, as Mistral's are published."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    more = {"weight_scale_inv": scale, "activation_scale": torch.ones(())}
    return {"weight": stored, **more}, stored.float() * scale


def fp8_autofp8(weight: Tensor) -> Made:
    """As AutoFP8 named it, for vLLM."""
    made, dense = fp8_tensor(weight)
    stored = {"weight": made["weight"], "weight_scale": made["weight_scale_inv"].view(1)}
    return {**stored, "input_scale": torch.ones(1)}, dense


def fp8_exponents(weight: Tensor) -> Made:
    """Scales that are bytes: exponents of two."""
    blocks = weight.view(weight.shape[0] // 32, 32, weight.shape[1] // 32, 32).abs().amax((1, 3))
    exponent = (blocks / 448).log2().ceil()
    wide = exponent.exp2().repeat_interleave(32, 0).repeat_interleave(32, 1)
    stored = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": (exponent + 127).to(torch.uint8)}, stored.float() * wide


def compressed_int4(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Made:
    scale = _scales(weight, 7, dtype)
    q = (weight / _wide(scale)).round().clamp(-8, 7)
    made = {"weight_packed": pack(q + 8, 4, 1), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return made, (q * _wide(scale)).to(dtype).float()


def compressed_int4_zero(weight: Tensor) -> Made:
    """With zero points, which are packed along the rows, and columns in an order of their own."""
    scale = _scales(weight, 5, torch.float16)
    order = torch.arange(weight.shape[1]).flip(0) // GROUP
    zero = torch.randint(-3, 4, scale.shape)
    q = (weight / scale.float()[:, order] + zero[:, order]).round().clamp(-8, 7)
    dense = ((q - zero[:, order]) * scale.float()[:, order]).to(torch.float16).float()
    made = {"weight_packed": pack(q + 8, 4, 1), "weight_scale": scale, "weight_g_idx": order.to(torch.int32)}
    return {**made, "weight_zero_point": pack(zero + 8, 4, 0), "weight_shape": torch.tensor(weight.shape)}, dense


def compressed_int8(weight: Tensor) -> Made:
    """A scale and a zero point for each row."""
    scale = _scales(weight, 120, torch.bfloat16, weight.shape[1])
    zero = torch.randint(-4, 5, scale.shape, dtype=torch.int8)
    q = (weight / scale.float() + zero).round().clamp(-128, 127)
    dense = ((q - zero) * scale.float()).to(torch.bfloat16).float()
    return {"weight": q.to(torch.int8), "weight_scale": scale, "weight_zero_point": zero}, dense


def compressed_fp8(weight: Tensor) -> Made:
    scale = _scales(weight, 448, torch.float32, weight.shape[1])
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def _fp4(weight: Tensor, grid: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Bytes of two FP4 numbers, and what these are times their scales, in bfloat16."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    q = (weight / _wide(grid, group)).unsqueeze(-1).sub(table).abs().argmin(-1)
    dense = (table[q] * _wide(grid, group)).to(torch.bfloat16).float()
    return (q[:, ::2] + 16 * q[:, 1::2]).to(torch.uint8), dense


def nvfp4(weight: Tensor) -> Made:
    groups = weight.view(len(weight), -1, 16).abs().amax(-1)
    most = 448 * 6 / weight.abs().max()
    scale = (groups / 6 * most).to(torch.float8_e4m3fn)
    stored, dense = _fp4(weight, scale.float() / most + 1e-30, 16)
    return {"weight_packed": stored, "weight_scale": scale, "weight_global_scale": most.view(1)}, dense


def compressed_mxfp4(weight: Tensor) -> Made:
    exponent = (weight.view(len(weight), -1, 32).abs().amax(-1) / 6).log2().ceil()
    stored, dense = _fp4(weight, exponent.exp2(), 32)
    return {"weight_packed": stored, "weight_scale": (exponent + 127).to(torch.uint8)}, dense


def compressed_blocks(weight: Tensor) -> Made:
    """A scale for each block; the last ones are cut."""
    made, dense = fp8(weight, (48, 48), torch.bfloat16)
    return {"weight": made["weight"], "weight_scale": made["weight_scale_inv"]}, dense.to(torch.bfloat16).float()


def gptq(weight: Tensor, bits: int = 4, offset: int = 1, ordered: bool = True) -> Made:
    """Scales and zero points (G, R); `offset`: what is taken from a zero point; columns in an order of their own."""
    scale = _scales(weight, max(1, 2 ** (bits - 1) - 2), torch.float16)
    zero = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1, scale.shape) + offset * (bits == 2)
    order = torch.arange(weight.shape[1]).roll(5) // GROUP if ordered else torch.arange(weight.shape[1]) // GROUP
    q = (weight / scale.float()[:, order] + zero[:, order]).round().clamp(0, 2**bits - 1)
    dense = ((q - zero[:, order]) * scale.float()[:, order]).to(torch.float16).float()
    made = {"qweight": pack(q.T, bits, 0), "qzeros": pack((zero - offset).T, bits, 1), "scales": scale.T.contiguous()}
    return (made | {"g_idx": order.to(torch.int32)} if ordered else made), dense


def awq(weight: Tensor) -> Made:
    """Eight rows in a word, in the order 0 2 4 6 1 3 5 7."""
    scale = _scales(weight, 6, torch.float16)
    zero = torch.randint(7, 10, scale.shape)
    q = (weight / _wide(scale) + zero.repeat_interleave(GROUP, 1)).round().clamp(0, 15)
    dense = ((q - zero.repeat_interleave(GROUP, 1)) * _wide(scale)).to(torch.float16).float()

    def in_words(numbers: Tensor) -> Tensor:  # (n, R)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return pack(numbers.view(len(numbers), -1, 8)[..., order].flatten(1), 4, 1)

    return {"qweight": in_words(q.T), "qzeros": in_words(zero.T), "scales": scale.T.contiguous()}, dense


NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 += [0.7230, 1.0]


def bnb4(weight: Tensor, nested: bool = True, dtype: torch.dtype = torch.bfloat16) -> Made:
    """Blocks of 64 numbers; their scales in 8 bits too, 256 of them with one scale."""
    table, flat = torch.tensor(NF4), weight.flatten().view(-1, 64)
    absmax = flat.abs().amax(1)
    made = {"weight.quant_map": table}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": str(dtype).removeprefix("torch."), "shape": [*weight.shape]}
    if nested:
        table2, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        absmax2 = torch.tensor([float((part - offset).abs().max()) for part in absmax.split(256)])
        wide = absmax2.repeat_interleave(256)[: len(absmax)]
        q2 = ((absmax - offset) / wide).unsqueeze(1).sub(table2).abs().argmin(1)
        made |= {
            "weight.absmax": q2.to(torch.uint8),
            "weight.nested_absmax": absmax2,
            "weight.nested_quant_map": table2,
        }
        absmax = table2[q2] * wide + offset
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        made["weight.absmax"] = absmax
    q = (flat / absmax.unsqueeze(1)).unsqueeze(-1).sub(table).abs().argmin(-1)
    dense = (table[q] * absmax.unsqueeze(1)).to(dtype).float().view(weight.shape)
    made["weight"] = (q.flatten()[::2] * 16 + q.flatten()[1::2]).to(torch.uint8).unsqueeze(1)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return made | {"weight.quant_state.bitsandbytes__nf4": text}, dense


def bnb8(weight: Tensor) -> Made:
    scale = weight.abs().amax(1)
    stored = (weight / scale.unsqueeze(1) * 127).round().to(torch.int8)
    dense = stored.float() * scale.unsqueeze(1) * 7.874015718698502e-3
    return {"weight": stored, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, dense


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4(weight: Tensor) -> Made:
    """Experts (E, D, R) -> blocks (E, R, D / 32, 16), scales (E, R, D / 32)."""
    blocks = weight.transpose(1, 2).reshape(weight.shape[0], weight.shape[2], -1, 32)
    exponent = (blocks.abs().amax(-1) / 6).log2().ceil()
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    q = (blocks / exponent.exp2().unsqueeze(-1)).unsqueeze(-1).sub(table).abs().argmin(-1)
    dense = (table[q] * exponent.exp2().unsqueeze(-1)).flatten(2).transpose(1, 2).contiguous()
    stored = (q[..., ::2] + 16 * q[..., 1::2]).to(torch.uint8)
    return {"_blocks": stored, "_scales": (exponent + 127).to(torch.uint8)}, dense


def _compressed(form: str, kind: str, bits: int, **more: object) -> dict[str, object]:
    weights = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": False, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


# Name -> what makes a weight of it, and the config's quantization_config.
MAKERS: dict[str, tuple[Callable[[Tensor], Made], dict[str, object]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "fp8-cut": (lambda w: fp8(w, (48, 48), torch.bfloat16), {"quant_method": "fp8", "weight_block_size": [48, 48]}),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-autofp8": (fp8_autofp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-exponents": (fp8_exponents, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "compressed-int4": (compressed_int4, _compressed("pack-quantized", "int", 4)),
    "compressed-int4-zero": (compressed_int4_zero, _compressed("pack-quantized", "int", 4)),
    "compressed-int8": (compressed_int8, _compressed("int-quantized", "int", 8)),
    "compressed-fp8": (compressed_fp8, _compressed("float-quantized", "float", 8)),
    "compressed-blocks": (compressed_blocks, _compressed("float-quantized", "float", 8, block_structure=[48, 48])),
    "nvfp4": (nvfp4, _compressed("nvfp4-pack-quantized", "float", 4)),
    "compressed-mxfp4": (compressed_mxfp4, _compressed("mxfp4-pack-quantized", "float", 4)),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq-8": (lambda w: gptq(w, 8, 1, False), {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "gptq-2": (lambda w: gptq(w, 2), {"quant_method": "gptq", "bits": 2, "group_size": GROUP, "desc_act": True}),
    "gptq-v2": (lambda w: gptq(w, 4, 0), {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "bnb-4": (bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb-4-flat": (lambda w: bnb4(w, False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb-8": (bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def quantized_checkpoint(folder: Path, kind: str, outer: bool = False) -> tuple[Path, Path]:
    """A tiny Llama whose layers' matrices are quantized, and the same one with the dense weights that it stands for.

    `outer`: the embedding and the lm_head too."""
    make, facts = MAKERS[kind]
    dense = tiny_checkpoint(folder / "dense", "llama", **SIZES)
    chosen = ("proj.weight", "embed_tokens.weight", "lm_head.weight") if outer else ("proj.weight",)
    return _written(dense, folder / "quantized", facts, lambda name: name.endswith(chosen), "weight", make)


def quantized_mixture(folder: Path, kind: str) -> tuple[Path, Path]:
    """A tiny Qwen3 mixture: each expert's matrices are tensors of their own on disk."""
    make, facts = MAKERS[kind]
    dense = tiny_checkpoint(
        folder / "dense", "qwen3_moe", hidden_size=64, intermediate_size=96, moe_intermediate_size=64
    )
    return _written(dense, folder / "quantized", facts, lambda name: name.endswith("proj.weight"), "weight", make)


def quantized_wrapper(folder: Path, kind: str) -> tuple[Path, Path]:
    """A tiny multimodal Mistral 3, quantized as the model above."""
    make, facts = MAKERS[kind]
    tiny_wrapper(folder / "dense", "mistral3")
    chosen = lambda name: "language_model" in name and name.endswith("proj.weight")  # noqa: E731
    return _written(folder / "dense", folder / "quantized", facts, chosen, "weight", make)


def quantized_experts(folder: Path) -> tuple[Path, Path]:
    """A tiny gpt-oss with experts in MXFP4, and the same one with the dense weights."""
    dense = tiny_checkpoint(folder / "dense", "gpt_oss", hidden_size=64, intermediate_size=96)
    facts = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return _written(
        dense, folder / "quantized", facts, lambda name: name.endswith("_proj") and "experts" in name, "", mxfp4
    )


def _written(
    dense: Path, folder: Path, facts: object, chosen: Callable[[str], bool], suffix: str, make: Callable[[Tensor], Made]
) -> tuple[Path, Path]:
    folder.mkdir()
    tensors, quantized = load_file(dense / "model.safetensors"), {}
    torch.manual_seed(0)
    for name, tensor in list(tensors.items()):
        if chosen(name):
            made, tensors[name] = make(tensor)
            quantized |= {name.removesuffix(suffix) + part: value for part, value in made.items()}
        else:
            quantized[name] = tensor
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_file({name: t.contiguous() for name, t in quantized.items()}, folder / "model.safetensors", {"format": "pt"})
    for path in dense.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return folder, dense
