"""The tables of docs/models.md: what opens, how that was tried, what is refused and why; from the tables in the code.

python tests/models_table.py     writes them into docs/models.md
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from tiny_types import DENSE, HYBRIDS, MIXTURES

from griffin_offload.checkpoint.quantized.find import REFUSED_FORMS
from griffin_offload.checkpoint.quantized.formats import FORMATS
from griffin_offload.model.architecture import ARCHITECTURES
from griffin_offload.model.multimodal import TWINS
from griffin_offload.model.refused import REFUSED, REFUSED_WRAPPERS
from griffin_offload.model.wrappers import WRAPPERS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- from here on: python tests/models_table.py -->\n", "<!-- to here -->\n"
TRIED_TYPES = """\
Tried with a tiny random model of each: streamed logits and KV cache are plain transformers', the pruned answer is
that of the full model with the other neurons set to zero, an export loads again and gives the same tokens."""
TRIED_WRAPPERS = """\
Tried with a tiny random checkpoint that transformers saved in the published class: the tokens are the wrapper's
own, whole and with the other neurons set to zero; only the text model's bytes are read; an export loads as the text
class."""
TRIED_FORMS = """\
Each is also tried in a tiny model: the tokens of the one with the dense weights, whole and pruned, and as many
bytes read as the file has. Int4 and FP8 of compressed-tensors, GPTQ and AWQ also against transformers itself, which
runs them by these libraries in float32: the same tokens."""
FORMS = {
    "fp8": ("FP8 with a scale for each block or tensor", "transformers, bit for bit; the formula"),
    "fp8-autofp8": ("FP8 with one scale a tensor, `weight_scale`, as AutoFP8 wrote it", "the formula"),
    "compressed-packed": ("int4, int8 in words; by tensor, row, group", "compressed-tensors 0.20, bit for bit"),
    "compressed": ("int8, FP8 as they are; by tensor, row, block", "compressed-tensors 0.20, bit for bit"),
    "compressed-fp4": ("NVFP4, MXFP4", "compressed-tensors 0.20, bit for bit"),
    "gptq": ("2, 4, 8 bits, with and without an order of columns, v1 and v2", "GPTQModel 7.7, bit for bit"),
    "awq": ("4 bits, version gemm", "GPTQModel 7.7 and AutoAWQ 0.2, bit for bit"),
    "mxfp4": ("experts of gpt-oss", "transformers, bit for bit"),
    "bitsandbytes-4": ("NF4, FP4, with scales in 8 bits or not", "bitsandbytes 0.50, bit for bit"),
    "bitsandbytes-8": ("LLM.int8() weights", "bitsandbytes 0.50, bit for bit"),
}


def tables() -> str:
    """The part of the page between BEGIN and END."""
    parts = [
        "## What opens, and what does not",
        "### Types of text models",
        *_table("what", "types", _types()),
        TRIED_TYPES,
        *_table("refused", "why", _by_reason(REFUSED)),
        "### Multimodal wrappers",
        *_table("text model inside", "wrappers", _wrappers()),
        TRIED_WRAPPERS,
        *_table("refused", "why", _by_reason(REFUSED_WRAPPERS)),
        "### Quantized weights",
        *_table("`quant_method`", "forms", "compared with", rows=_forms()),
        TRIED_FORMS,
        *_table("refused", "why", [(f"`{method}`", reason) for method, reason in REFUSED_FORMS.items()]),
    ]
    return "\n".join(parts) + "\n"


def _types() -> list[tuple[str, str]]:
    kinds = {"dense": DENSE, "mixtures of experts": MIXTURES, "with recurrent or convolution layers": HYBRIDS}
    rows, seen = [], set()
    for title, configs in kinds.items():
        here = {str(fields.get("model_type", name)) for name, fields in configs.items()} - seen
        seen |= here
        rows.append((title, _names(here)))
    rest = ARCHITECTURES.keys() - seen
    return [*rows, ("as another type", _names(rest))] if rest else rows


def _wrappers() -> list[tuple[str, str]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    inside = defaultdict(list)
    for kind in sorted(WRAPPERS):
        text = CONFIG_MAPPING[kind]().get_text_config(decoder=True).model_type
        inside[text].append(kind)
    return [
        (
            f"`{text}`, run as `{TWINS[text][0]}`"
            if text in TWINS
            else f"the type that the config says, by default `{text}`",
            _names(kinds),
        )
        for text, kinds in sorted(inside.items())
    ]


def _forms() -> list[tuple[str, str, str]]:
    assert FORMS.keys() == {name for name, format in FORMATS.items() if format.method}
    return [(f"`{FORMATS[name].method}`", *row) for name, row in FORMS.items()]


def _by_reason(refused: Mapping[str, str]) -> list[tuple[str, str]]:
    kinds = defaultdict(list)
    for kind, reason in refused.items():
        kinds[reason].append(kind)
    return sorted((_names(names), reason) for reason, names in kinds.items())


def _names(kinds: Iterable[str]) -> str:
    return " ".join(f"`{kind}`" for kind in sorted(kinds))


def _table(*titles: object, rows: Iterable[tuple[str, ...]] | None = None) -> list[str]:
    if rows is None:
        *titles, rows = titles  # type: ignore[assignment]
    lines = [titles, ["---"] * len(titles), *rows]  # type: ignore[list-item]
    return ["", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def replaced(page: str) -> str:
    """The page with the tables as they are now."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: BEGIN + tables() + END, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
