"""Reads the fields of a request's JSON: each is asked for by name and type, and what nobody asked for is refused."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from .api_error import ApiError, invalid

T = TypeVar("T")
NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises ApiError."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object")
    return value


class Fields:
    """The fields of one JSON object; `path` is where it stands in the request. null is as good as nothing."""

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise invalid(path or None, f"{path or 'the body'} must be an object")
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path, self._known = path, set[str]()

    def name(self, field: str) -> str:
        return f"{self._path}.{field}" if self._path else field

    def wrong(self, field: str, message: str) -> ApiError:
        """The error of one field."""
        return invalid(self.name(field), f"{self.name(field)} {message}")

    def get(self, field: str, kind: type[T], *, least: float = -math.inf, most: float = math.inf) -> T | None:
        """A field of that type, a number from `least` to `most`; None where it is not there. Raises ApiError."""
        self._known.add(field)
        value = self._values.get(field)
        if value is None:
            return None
        if not is_a(value, kind):
            raise self.wrong(field, f"must be {NAMES[kind]}")
        if isinstance(value, str):
            check_text(value, self.name(field))
        if kind in (int, float) and not least <= value <= most:
            raise self.wrong(field, f"must be {least:g} to {most:g}")
        return float(value) if kind is float else value  # type: ignore[return-value]

    def need(self, field: str, kind: type[T]) -> T:
        value = self.get(field, kind)
        if value is None:
            raise invalid(self.name(field), f"{self.name(field)} is missing", "missing_required_parameter")
        return value

    def choice(self, field: str, choices: Sequence[str], default: str) -> str:
        value = self.get(field, str) or default
        if value not in choices:
            raise self.wrong(field, f"must be one of {', '.join(choices)}")
        return value

    def raw(self, field: str) -> Any:
        """A field of whatever type."""
        self._known.add(field)
        return self._values.get(field)

    def ignore(self, *names: str) -> None:
        """Fields that change no answer here."""
        self._known.update(names)

    def refuse(self, why: Mapping[str, str]) -> None:
        """Fields of OpenAI's that would change the answer, and that are not there. Raises ApiError."""
        for field, reason in why.items():
            if self.raw(field) not in (None, [], {}, ""):
                raise invalid(
                    self.name(field), f"{self.name(field)} is not supported: {reason}", "unsupported_parameter"
                )

    def close(self, others: Iterable[str] = ()) -> None:
        """Raises ApiError for a field that nobody asked for."""
        for field in self._values:
            if field not in self._known:
                near = get_close_matches(str(field), [*self._known, *others], 1)
                hint = f"; is it {near[0]}?" if near else ""
                raise invalid(
                    self.name(field), f"unknown field {self.name(str(field)[:60])}{hint}", "unknown_parameter"
                )


def is_a(value: Any, kind: type) -> bool:
    """As JSON has it: true is no number, 1 is a float too, 1.0 a whole number."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_text(text: str, name: str) -> str:
    """Raises ApiError for halves of characters, which JSON can write and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(name, f"{name} is not a text: it has half a surrogate pair") from None
    return text
