"""Which of the weights that stay are kept in which format."""

from dataclasses import dataclass, replace
from typing import Any

from ..options import RESIDENT_DTYPES, RESTS, check


@dataclass(frozen=True)
class Precision:
    """What stays resident in which format of packed.FORMATS: `kept`, `others` (the layers' other matrices:
    attention) and `head`; `rest`: the neurons that are no experts, None if they are dropped."""

    kept: str = ""
    others: str = ""
    head: str = ""
    rest: str | None = None

    @property
    def quantized(self) -> bool:
        return self != NATIVE

    def to_json(self) -> dict[str, Any]:
        """The names that `--json` has: the kept neurons are "experts"."""
        return {"experts": self.kept, "others": self.others, "head": self.head, "rest": self.rest}

    def __str__(self) -> str:
        return self.kept or "unpacked"


NATIVE = Precision()
# A head in 4 bits would cost more than its bytes are worth: it has the last word on every token.
RESIDENT = {"bfloat16": NATIVE, "int8": Precision("int8", "int8", "int8"), "int4": Precision("int4", "int4", "int8")}


def precision(resident_dtype: str, rest: str) -> Precision:
    """Raises OptionError for a name that is not of choices.RESIDENT_DTYPES and RESTS."""
    check(resident_dtype, RESIDENT_DTYPES, "resident dtype")
    check(rest, RESTS, "rest")
    return replace(RESIDENT[resident_dtype], rest=None if rest == "drop" else rest)
