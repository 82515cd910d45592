"""The format of each group of resident weights."""

from dataclasses import dataclass
from typing import Any

from ..options import RESIDENT_DTYPES, RESTS, check


@dataclass(frozen=True)
class Precision:
    """Formats, by name (formats.FORMATS; '' is the model's own dtype), of the kept neurons, of the layers' other
    matrices (attention) and of lm_head. `rest`: the format of all other neurons; None: they are dropped."""

    kept: str = ""
    others: str = ""
    head: str = ""
    rest: str | None = None

    @property
    def quantized(self) -> bool:
        return self != NATIVE

    def to_json(self, dtype: str = "") -> dict[str, Any]:
        """In `--json` the kept neurons are called "experts". `dtype`: in which the model runs."""
        named = {"experts": self.kept, "others": self.others, "head": self.head}
        return {**{name: format or dtype for name, format in named.items()}, "rest": self.rest}

    def __str__(self) -> str:
        return self.kept or "unpacked"


NATIVE = Precision()
HEAD = "int8"  # lm_head's format with every quantized one: 4 bits cost too much quality for the bytes that they save


def precision(resident_dtype: str, rest: str) -> Precision:
    """Two options (RESIDENT_DTYPES, RESTS) -> the formats that they stand for. Raises OptionError."""
    check(resident_dtype, RESIDENT_DTYPES, "resident dtype")
    check(rest, RESTS, "rest")
    keeps = None if rest == "drop" else rest
    if resident_dtype == RESIDENT_DTYPES[0]:
        return Precision(rest=keeps)
    return Precision(resident_dtype, resident_dtype, HEAD, keeps)
