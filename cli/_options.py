"""Click options made from the option groups of options/, and the groups that a command gets of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, cast

import click

from ..inputs import SETTINGS
from ..options import (
    AUTO,
    MOST,
    Decoding,
    ExportFormat,
    Option,
    Placement,
    Pruning,
    build,
    declared,
    parse_pair,
    parse_shares,
    parse_switch,
)
from ._flags import Decorator, F, decorate, flag, seed_option, several
from ._outputs import READ
from ._text import read_file
from ._usage import check_greedy, check_usage, told_where, yielding

KEYWORDS = {Placement: "placement", Pruning: "pruning", Decoding: "decoding", ExportFormat: "export_format"}
SPARSITY_OF_ROWS = "Share of the feed-forward neurons that are not kept as they are, 0 (the full model) to 1."
ALLOCATION_OF_ROWS = "How the sparsity is shared over the layers. sensitivity: as `griffin calibrate` measured it."
REST_OF_ROWS = (
    "The neurons that the prompt does not choose: int4, int8: kept in so many bits; drop: left out, the kept ones take "
    "over. With drop all texts share readings of the model; in fewer bits each text reads it for itself."
)
RESIDENT_DTYPE_OF_ROWS = "Format of the weights kept in memory. bfloat16: as the model runs."
FOLD_OF_ROWS = "How strongly the fold holds on to the weights as they were; 0: nothing is folded."
KNOWN = {name: (told, default) for group in KEYWORDS for name, told, default in declared(group)}


class Shares(click.ParamType):  # type: ignore[type-arg]
    """A number, or one for each layer: with commas between them, or in a file (commas, spaces, lines or JSON)."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value.lower() == AUTO:
            return None
        text = value
        if os.path.isfile(value):
            if ctx:
                ctx.meta.setdefault(READ, []).append(Path(value))
            text = read_file(value, SETTINGS).strip().removeprefix("[").removesuffix("]")
        try:
            return parse_shares(text)
        except ValueError:
            self.fail(f"{value!r} is not a number, a list such as 0.2,0.5, or a file of numbers", param, ctx)


class Pair(click.ParamType):  # type: ignore[type-arg]
    """Two whole numbers with a comma between them."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_pair(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not FIRST,LAST: write two numbers such as 2,2", param, ctx)


TYPES: dict[Any, Any] = {parse_shares: Shares(), parse_pair: Pair()}


@dataclass(frozen=True)
class Some:
    """A group's options for one command: `only` these or all `without` those; other `defaults` and `helps` by name."""

    group: type
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Decorator]:
        """Click options by name. None is given to the command for what is not on its line, False for a switch."""
        return {
            name: option(name, shown=self.defaults.get(name), help=self.helps.get(name))
            for name, *_ in declared(self.group)
            if name not in self.without and name in (self.only or (name,))
        }


def option(name: str, *, shown: Any = None, help: str | None = None, **changes: Any) -> Decorator:
    """The click option of a declared option. `shown`: another default to tell of in --help; `changes` are click's."""
    told, default = KNOWN[name]
    words = told.default or default if shown is None else shown
    text = f"{help or told.help} [default: {words}]" if words else help or told.help
    if told.parse is parse_switch:
        if default is None:
            return click.option(f"{flag(name)}/--no-{flag(name)[2:]}", name, default=None, help=text, **changes)
        return click.option(flag(name), is_flag=True, help=text, **changes)
    facts = {"type": kind(told), "metavar": told.metavar or None, "help": text, **changes}
    if told.several:  # None, as elsewhere, where it is not given
        facts |= {"type": str, "multiple": True, "callback": lambda _, __, each: sum(map(told.parse, each), ()) or None}
    return click.option(flag(name), name, **facts)


def kind(told: Option) -> Any:
    if told.strict:
        return click.IntRange(int(told.low), MOST)
    return click.Choice(told.choices) if told.choices else TYPES.get(told.parse, told.parse)


def repeated(
    name: str, plural: str, default: tuple[Any, ...] = (), help: str = "", shown: str = "", **changes: Any
) -> Decorator:
    """A declared option that may be given several times, one number or name each."""
    told, _ = KNOWN[name]
    choices = [choice for choice in told.choices if choice != AUTO]
    facts = {"type": click.Choice(choices) if choices else float, "metavar": told.metavar or None, **changes}
    shown = shown or ("" if help or default else told.default)
    return several(flag(name), plural, default, help or told.help, shown, **facts)


def takes(*groups: "type | Some") -> Decorator:
    """Gives a command the options of the groups; it gets the groups themselves: placement, pruning, decoding ...

    Raises click.UsageError for an option that needs another one, OptionError for a value outside its range."""
    chosen = [each if isinstance(each, Some) else Some(each) for each in groups]
    options = {name: each for some in chosen for name, each in some.options().items()}
    known = {name: KNOWN[name][0] for name in options}

    def wrap(command: F) -> F:
        @wraps(command)
        def run(**values: Any) -> Any:
            given = {name: value for name in options if (value := values.pop(name)) is not None}
            given = yielding(given)
            with told_where(given, known):
                check_usage(given)
                built: dict[str, Any] = {
                    KEYWORDS[some.group]: build(some.group, {**some.defaults, **given}) for some in chosen
                }
                check_greedy(built.get("decoding"), built.get("pruning"))
            return command(**values, **built)

        return cast(F, decorate(run, *options.values()))

    return wrap


def compares(command: F) -> F:
    """Gives an evaluation the options of Pruning that may be repeated, and --seed; it gets `variants`: every
    combination, the full model once."""

    @wraps(command)
    def run(**values: Any) -> Any:
        from ..evaluation.scoring.variant import all_variants

        names = ("sparsities", "selections", "allocations", "seed", "resident_dtypes", "rests", "folds", "method")
        return command(variants=all_variants(*(values.pop(name) for name in names)), **values)

    return decorate(
        cast(F, run),
        repeated("sparsity", "sparsities", (0.0, 0.5), SPARSITY_OF_ROWS),
        repeated("selection", "selections", ("topk",), "How the kept neurons are chosen."),
        repeated("allocation", "allocations", ("uniform",), ALLOCATION_OF_ROWS),
        repeated("resident_dtype", "resident_dtypes", ("bfloat16",), RESIDENT_DTYPE_OF_ROWS),
        repeated("rest", "rests", (), REST_OF_ROWS, "int4, as answers have it where it fits"),
        repeated("fold_strength", "folds", (), FOLD_OF_ROWS, "0.3 where neurons are dropped"),
        option("method"),
        seed_option("Seed of the selections that draw: sampling, topk-sampling, random."),
    )
