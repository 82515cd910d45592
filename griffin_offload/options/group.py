"""A group is a frozen dataclass of declared options. Makes one from values or from text, and gives its values."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, replace
from typing import Any, TypeVar

from ..errors import OptionError
from .declare import Option
from .names import METHODS

Group = TypeVar("Group")


def declared(group: Any, values: Any = None) -> Iterator[tuple[str, Option, Any]]:
    """Name, Option and default (or the value that `values`, one of this group, has) of each option of a group.

    Those of a group within it come by its prefix: `ffn_skip` (its first field), `ffn_skip_mode` ..."""
    for each in fields(group):
        told: Option | None = each.metadata.get("option")
        if told is None:
            continue
        value = _default(each) if values is None else getattr(values, each.name)
        if not told.prefix:
            yield each.name, told, value
            continue
        for number, (name, inner, within) in enumerate(declared(type(_default(each)), value)):
            yield (f"{told.prefix}_{name}" if number else told.prefix), inner, within


def default_of(group: type, name: str) -> Any:
    """The default of one field."""
    return _default(next(each for each in fields(group) if each.name == name))


def _default(each: "Field[Any]") -> Any:
    if each.default is not MISSING:
        return each.default
    assert each.default_factory is not MISSING
    return each.default_factory()


class Checked:
    """Checks every field when a group is made."""

    def __post_init__(self) -> None:
        for name, each, value in declared(type(self), self):
            each.check(name, value)


def build(group: type[Group], values: Mapping[str, Any]) -> Group:
    """A group from its options by their declared names; what is not given, or None, has its default.

    Raises OptionError for a value outside its range."""
    given = {name: value for name, value in values.items() if value is not None}
    for name, known, _ in declared(group):
        known.check(name, given.get(name))  # by this name, which a group within it does not know
    found: dict[str, Any] = {}
    for each in fields(group):  # type: ignore[arg-type]
        told: Option | None = each.metadata.get("option")
        if told is not None and told.prefix:
            inner = type(_default(each))
            names = zip((name for name, *_ in declared(group) if name.startswith(told.prefix)), fields(inner))  # noqa: B905
            found[each.name] = inner(**{to.name: given[name] for name, to in names if name in given})
        elif each.name in given:
            found[each.name] = given[each.name]
    return group(**found)


def as_dict(group: Any) -> dict[str, Any]:
    """The values of a group by their declared names."""
    return {name: value for name, _, value in declared(type(group), group)}


def with_text(group: Group, name: str, text: str) -> Group:
    """The same group, one option read from text; 'none' or 'default' gives its default. Raises OptionError."""
    told, default = {known: (each, value) for known, each, value in declared(type(group))}[name]
    try:
        value = default if text.lower() in ("none", "default") else told.parse(text)
    except ValueError:
        raise OptionError(f"{name} cannot be {text!r}: give {told.wanted}, or none") from None
    values = {**as_dict(group), name: value}
    if name == "method":  # what the last one had set is open again
        values |= dict.fromkeys(METHODS.get(as_dict(group)[name] or "", ()))
    undeclared = {each.name: getattr(group, each.name) for each in fields(group) if not each.metadata}  # type: ignore[arg-type]
    return replace(build(type(group), values), **undeclared)  # type: ignore[type-var]


def from_keywords(keywords: dict[str, Any], group: type[Group], given: Group | None = None) -> Group:
    """A group from those of the keywords that are its fields, which are taken out; or `given`, changed by them."""
    own = {each.name: keywords.pop(each.name) for each in fields(group) if each.name in keywords}  # type: ignore[arg-type]
    return replace(given, **own) if given is not None else group(**own)  # type: ignore[type-var]
