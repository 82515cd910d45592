"""Small JSON files that Griffin writes for itself: measurements, curves, the last report, notes, conversations.

What is in one may be anything by the time it is read: cut off, of another version, or another's. It is checked here,
once for all of them."""

import json
import math
from pathlib import Path
from typing import Any

from .inputs import SETTINGS, read_input

_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def read_object(path: Path, limit: int = SETTINGS) -> dict[str, Any]:
    """The JSON object in a plain file of at most `limit` bytes. Raises OSError, or ValueError that says what is wrong
    with it."""
    return parse_object(read_input(path, limit))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Raises ValueError for all that is no JSON object."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    if not isinstance(content, dict):
        raise ValueError(f"it is no JSON object but {_kind(content)}")
    return content


def need(content: dict[str, Any], key: str, kind: type) -> Any:
    """The value of a key, of this kind: str, int, float (a finite number, whole or not), bool, dict or list.

    Raises ValueError that names the key."""
    if key not in content:
        raise ValueError(f"{key} is missing")
    return as_kind(content[key], kind, key)


def as_kind(value: Any, kind: type, name: str) -> Any:
    """The value, if it is of this kind, a number as a float where one is wanted. Raises ValueError."""
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise ValueError(f"{name} is not a finite number")
    if type(value) is not kind:
        raise ValueError(f"{name} is not {_WORDS[kind]} but {_kind(value)}")
    if kind is str and not is_text(value):
        raise ValueError(f"{name} is not Unicode text")
    return value


def is_text(value: Any) -> bool:
    """Whether a value is text without halves of characters, which JSON can say and no tokenizer takes."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def _kind(value: Any) -> str:
    return "null" if value is None else _WORDS[type(value)]
