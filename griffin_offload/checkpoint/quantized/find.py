"""A checkpoint's tensors -> its weights: tensors that hold one together become one, which the reader decodes."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from ...errors import CheckpointError, UnsupportedArchitecture, one_line
from ..headers import Checkpoint, Packed, TensorInfo
from . import decode
from .bnb import bnb_state
from .formats import FORMATS, METHODS, Format
from .rows import Settings

QUANTIZATION = ("quantization_config", "compression_config")  # fields of a config
WAY_OUT = "use the original weights in bfloat16, float16 or float32, or a GGUF file of the model"
# Forms of the methods above that are not read, and why; for the page of models.
REFUSED_FORMS = {
    "gptq": "3 bits, whose numbers cross words; Marlin's order; modules with settings of their own (`dynamic`)",
    "awq": "versions other than gemm: their orders of words were not tried",
    "compressed-tensors": "MXFP6, MXFP8; sparse forms; a `transform_config`, which rotates activations too; "
    "groups of several numbers of bits",
    "others": "hqq, quanto, torchao, aqlm, quark ...: use the original weights, or a GGUF file of the model",
}
COMPRESSED = frozenset(
    """pack-quantized int-quantized float-quantized naive-quantized nvfp4-pack-quantized
    mxfp4-pack-quantized""".split()  # noqa: SIM905
)


def quantization(config: Any) -> dict[str, Any]:
    """What a config (or the text model's config in it) says of quantized weights; {} where they are not."""
    parts = [vars(config), vars(getattr(config, "text_config", None) or object)]
    found = [part[name] for part in parts for name in QUANTIZATION if part.get(name)]
    return dict(found[0]) if found and isinstance(found[0], dict) else {}


def dense_weights(checkpoint: Checkpoint, facts: Mapping[str, Any], dtype: torch.dtype) -> Checkpoint:
    """The same checkpoint with a tensor for each weight, of `dtype` when it is read. `facts`: of `quantization`.

    Raises UnsupportedArchitecture for a method or form that is not read, CheckpointError where tensors do not fit."""
    method = method_of(facts)
    try:
        settings = _settings(method, facts)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        where = f"{checkpoint.folder}/config.json: its quantization_config"
        raise CheckpointError(f"{where} is not of the form that {method} has: {one_line(error)}") from None
    tensors = dict(checkpoint.tensors)
    for name, format in FORMATS.items():
        if format.method == method:
            for info in list(tensors.values()):
                if found := _weight(tensors, info, name, format, settings):
                    weight, used = found
                    for tensor in used:
                        del tensors[tensor]
                    tensors[weight.name] = replace(weight, dtype=dtype)
    if len(tensors) == len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says that weights are quantized by {method} (quantization_config), and "
            "no tensor of the files is: if they are not, take that field out"
        )
    return replace(checkpoint, tensors=tensors)


def method_of(facts: Mapping[str, Any]) -> str:
    """The method that a quantization_config names. Raises UnsupportedArchitecture for one that is not read."""
    old = "bitsandbytes" if facts.get("load_in_4bit") or facts.get("load_in_8bit") else ""
    method = facts.get("quant_method") or old
    if isinstance(method, str) and method in METHODS:
        return method
    named = f"quantized by {ascii(method)[:60]}" if method else "quantized by a method that has no name there"
    known = ", ".join(sorted(METHODS))
    raise UnsupportedArchitecture(
        f"its weights are {named} (quantization_config in config.json), which Griffin does not read "
        f"(it reads {known}); {WAY_OUT}"
    )


def _refuse(method: str, what: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(f"its weights are quantized by {method} with {what}, which is not read; {WAY_OUT}")


def _settings(method: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the config that a format needs. Raises UnsupportedArchitecture for forms that are not read."""
    if method == "fp8":
        blocks = list(facts.get("weight_block_size") or (0, 0))
        if len(blocks) != 2:
            raise ValueError(f"weight_block_size is {blocks}, not rows and columns")
        return {"block_rows": int(blocks[0]), "block_columns": int(blocks[1])}
    if method == "gptq":
        return _gptq_settings(facts)
    if method == "awq" and (facts.get("bits", 4), str(facts.get("version", "gemm")).lower()) != (4, "gemm"):
        raise _refuse(method, f"{facts.get('bits')} bits, version {facts.get('version')}")
    return _compressed_settings(facts) if method == "compressed-tensors" else {}


def _gptq_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    bits, form = facts.get("bits"), str(facts.get("checkpoint_format") or "gptq")
    if bits not in (2, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise _refuse("gptq", f"{bits} bits in the form {form}")
    if changed := [name for name in facts.get("dynamic") or {} if not str(name).startswith("-")]:
        raise _refuse("gptq", f"settings of their own for {changed[0]}")
    return {"bits": bits, "zero_offset": int(form == "gptq")}


def _compressed_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    if facts.get("transform_config"):
        raise _refuse("compressed-tensors", "a transform (a rotation of weights and activations)")
    if (sparsity := (facts.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise _refuse("compressed-tensors", f"the sparse form {sparsity}")
    groups = list((facts.get("config_groups") or {}).values())
    forms = {group.get("format") or facts.get("format") for group in groups}
    if unknown := {str(form) for form in forms - COMPRESSED}:
        raise _refuse("compressed-tensors", f"the form {', '.join(sorted(unknown))}")
    weights = [group.get("weights") or {} for group in groups]
    bits = {one.get("num_bits") for one in weights if one.get("type", "int") == "int"}
    if "pack-quantized" in forms and not (len(bits) == 1 and bits <= {4, 8}):
        raise _refuse("compressed-tensors", f"integers of {sorted(map(str, bits))} bits")
    blocks = {tuple(one["block_structure"]) for one in weights if one.get("block_structure")}
    if len(blocks) > 1:
        raise _refuse("compressed-tensors", "blocks of several sizes")
    found = {"bits": bits.pop()} if len(bits) == 1 else {}
    for rows, columns in blocks:
        found |= {"block_rows": int(rows), "block_columns": int(columns)}
    return found


def _weight(
    tensors: Mapping[str, TensorInfo], main: TensorInfo, kind: str, format: Format, settings: Settings
) -> tuple[TensorInfo, list[str]] | None:
    """The weight that a tensor has the numbers of, and the names of all tensors that hold it; None if it has none."""
    if not main.name.endswith(format.main) or str(main.dtype) not in format.dtypes:
        return None
    base = main.name.removesuffix(format.main)
    sides = {role: tensors[base + suffix] for role, suffix in format.sides.items() if base + suffix in tensors}
    if len(sides) < len(format.sides):
        return None
    more = (format.optional or {}).items()
    sides |= {role: tensors[base + suffix] for role, suffix in more if base + suffix in tensors}
    used = [main.name, *(info.name for info in sides.values())]
    try:
        if kind == "bitsandbytes-4":
            state, more_settings = bnb_state(tensors, main)
            settings, used = {**settings, **more_settings}, [*used, state]
            main = replace(main, dtype=torch.uint8, shape=(main.bytes,))
        shape = format.shape(main, sides, settings)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{main.file}: {main.name} is not of the form that {format.method} has: {one_line(error)}"
        ) from None
    known = {**settings, "rows": prod(shape[:-1]), "columns": shape[-1]}
    read = tuple((role, info) for role, info in sides.items() if role not in ("shape", "form"))
    packed = Packed(kind, shape, main, read, tuple(sorted(known.items())))
    packed = replace(packed, last=decode.units(packed))
    return TensorInfo(base + format.weight, main.dtype, shape, main.file, main.begin, main.end, packed), used
