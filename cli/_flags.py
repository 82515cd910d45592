"""Options of commands that no group declares: counts, names of files, switches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..options import AUTO, MOST, MOST_TOKENS
from . import _console as console

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def decorate(command: F, *options: Decorator) -> F:
    """Options in the order in which --help lists them."""
    for each in reversed(options):
        command = each(command)
    return command


def several(flag: str, plural: str, default: tuple[Any, ...], help: str, shown: str = "", **changes: Any) -> Decorator:
    """An option that may be given several times: the command gets a tuple of that plural name.

    `shown`: what --help tells of an empty default."""
    text = f"{help} Give several to compare." + (f" [default: {shown}]" if shown else "")
    facts = {"default": default, "show_default": bool(default), **changes}
    return click.option(flag, plural, multiple=True, help=text, **facts)


class CountOrAuto(click.IntRange):
    """A whole number, or auto."""

    name = "integer range or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.lower() == AUTO:
            return AUTO
        return super().convert(value, param, ctx)


def count(
    flag: str, default: Any, help: str, *names: str, low: int = 1, metavar: str = "N", **changes: Any
) -> Decorator:
    """A whole number, `low` or more up to what a run counts, that is in no group. A default of None is told in
    `help`."""
    high = MOST_TOKENS if "token" in flag else MOST
    facts = {
        "type": click.IntRange(low, high),
        "default": default,
        "show_default": default is not None,
        "metavar": metavar,
    }
    return click.option(flag, *names, help=help, **{**facts, **changes})


def file(flag: str, help: str, *names: str, dir_okay: bool = True, **changes: Any) -> Decorator:
    """The name of a file, as a Path."""
    kind = click.Path(dir_okay=dir_okay, path_type=Path)
    return click.option(flag, *names, help=help, **{"type": kind, "metavar": "FILE", **changes})


class Address(click.Path):
    """A Path, or the text of an address such as s3://bucket/name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


def address(flag: str, help: str, *names: str) -> Decorator:
    """The name of a file, as a Path, or its address elsewhere, as a text."""
    return file(flag, help, *names, type=Address(path_type=Path))


def switch(flag: str, help: str) -> Decorator:
    return click.option(flag, is_flag=True, help=help)


def seed_option(help: str) -> Decorator:
    return count("--seed", 0, help, type=click.IntRange(0, 2**32 - 1))


def quiet_option(command: F) -> F:
    """--quiet: the answer and errors alone."""

    def told(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        console.be_quiet(value)
        context.call_on_close(lambda: console.be_quiet(False))  # where several commands run in one process

    text = "Print the answer and errors alone: no notes, no progress, no report."
    wrap = click.option("--quiet", "-q", is_flag=True, expose_value=False, is_eager=True, callback=told, help=text)
    return wrap(command)


def json_option(help: str = "Print one JSON object instead of a table.") -> Decorator:
    return click.option("--json", "as_json", is_flag=True, help=help)
