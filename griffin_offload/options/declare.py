"""Declares an option: its default, its help, how it is read from text, and which values it takes."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError


def check(name: str, known: Sequence[str], what: str) -> None:
    """Raises OptionError for a name that is not among `known`."""
    if name not in known:
        raise OptionError(f"{what} {name!r} is not known; known: {', '.join(known)}")


@dataclass(frozen=True)
class Option:
    """What is known of one option. `parse` reads it from text; `wanted` says in words what that text should be.

    `several`: a flag that may be given more than once, for a tuple of values.
    `low` to `high`, or more than `above`: the range, which `allowed` gives in words; `strict`: for a command, a value
    outside it is wrong usage. `default`: what --help says of a default that the field itself cannot show.
    `prefix`: a group within a group, whose names begin with it."""

    help: str
    parse: Callable[[str], Any] = str
    wanted: str = "a text"
    metavar: str = ""
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    allowed: str = ""
    strict: bool = False
    default: str = ""
    prefix: str = ""
    several: bool = False

    def takes(self, value: Any) -> bool:
        """Whether a value, such as a file of ours holds, is of the type that the option has. None is a default."""
        if value is None:
            return True
        each = value if isinstance(value, tuple) else ()
        if self.parse is parse_pair:
            return len(each) == 2 and all(type(one) is int for one in each)
        if self.parse is parse_texts:
            return isinstance(value, tuple) and all(type(one) is str for one in each)
        if self.parse is parse_switch or self.parse in (int, str):
            return type(value) is (bool if self.parse is parse_switch else self.parse)
        return all(type(one) in (int, float) for one in each or (value,))

    def check(self, name: str, value: Any) -> None:
        """Raises OptionError for a value (or one of several) that is outside the range or no choice."""
        if value is None:
            return
        if self.choices:
            check(value, self.choices, name)
        if self.allowed:
            for each in value if isinstance(value, tuple | list) else (value,):
                if isinstance(each, int) and abs(each) >= 2**63:  # more than a float, or a tensor, can hold
                    raise OptionError(f"{name} {str(each)[:20]}... is outside its range: {self.allowed}, below 2^63")
                if not (math.isfinite(each) and self.low <= each <= self.high and each > self.above):
                    percent = self.low == 0 and self.high == 1 and 1 < each <= 100
                    meant = f"; did you mean {each / 100:g}?" if percent else ""
                    raise OptionError(f"{name} {each} is outside its range: {self.allowed}{meant}")


def option(default: Any, help: str, /, **facts: Any) -> Any:
    """A field of an option group: its default, its help, and what else an Option knows."""
    return field(default=default, metadata={"option": Option(help, **facts)})


def number(default: Any, help: str, /, **facts: Any) -> Any:
    return option(default, help, parse=float, wanted="a number", **facts)


def whole(default: Any, help: str, /, **facts: Any) -> Any:
    return option(default, help, parse=int, wanted="a whole number", **{"metavar": "N", **facts})


def switch(help: str, /, *, value: bool | None = False, **facts: Any) -> Any:
    """On or off. Where `value`, the default, is None, the flag has a --no- form too."""
    return option(value, help, parse=parse_switch, wanted="on or off", **facts)


def parse_switch(text: str) -> bool:
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def parse_shares(text: str) -> float | tuple[float, ...]:
    """'0.5' or '50%', or one number for each layer: '0.2,0.5,0.9' (commas, spaces or lines)."""
    parts = text.replace(",", " ").split()
    shares = tuple(float(part[:-1]) / 100 if part.endswith("%") else float(part) for part in parts)
    if not shares:
        raise ValueError(text)
    return shares if len(shares) > 1 else shares[0]


def parse_pair(text: str) -> tuple[int, int]:
    """'2,2'."""
    first, last = text.split(",")
    return int(first), int(last)


def parse_texts(text: str) -> tuple[str, ...]:
    r"""'###', with \n and \t for a line's end and a tab; or several as a JSON list: '["###", "\n"]'."""
    if text.startswith("["):
        found = json.loads(text)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError(text)
        return tuple(found)
    return (text.replace("\\n", "\n").replace("\\t", "\t"),)
