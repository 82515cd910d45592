"""Click options made from the option groups of options/, and the objects that a command gets for them."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ..errors import GriffinError, OptionError
from ..inputs import SETTINGS
from ..options import (
    AUTO,
    MOST,
    MOST_TOKENS,
    OFF,
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
from ..sources.resolve import DEFAULT_MODEL, find
from ..units import format_bytes
from . import _console as console
from ._outputs import READ
from ._settings import source_of
from ._text import read_file

if TYPE_CHECKING:
    from ..engine import Engine
    from ..planning.plan import Plan
    from ..report import Report

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

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


class CountOrAuto(click.IntRange):
    """A whole number, or auto."""

    name = "integer range or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.lower() == AUTO:
            return AUTO
        return super().convert(value, param, ctx)


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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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


def several(flag: str, plural: str, default: tuple[Any, ...], help: str, shown: str = "", **changes: Any) -> Decorator:
    """An option that may be given several times: the command gets a tuple of that plural name.

    `shown`: what --help tells of an empty default."""
    text = f"{help} Give several to compare." + (f" [default: {shown}]" if shown else "")
    facts = {"default": default, "show_default": bool(default), **changes}
    return click.option(flag, plural, multiple=True, help=text, **facts)


def repeated(
    name: str, plural: str, default: tuple[Any, ...] = (), help: str = "", shown: str = "", **changes: Any
) -> Decorator:
    """A declared option that may be given several times, one number or name each."""
    told, _ = KNOWN[name]
    choices = [choice for choice in told.choices if choice != AUTO]
    facts = {"type": click.Choice(choices) if choices else float, "metavar": told.metavar or None, **changes}
    shown = shown or ("" if help or default else told.default)
    return several(flag(name), plural, default, help or told.help, shown, **facts)


def decorate(command: F, *options: Decorator) -> F:
    """Options in the order in which --help lists them."""
    for each in reversed(options):
        command = each(command)
    return command


def takes(*groups: "type | Some") -> Decorator:
    """Gives a command the options of the groups; it gets the groups themselves: placement, pruning, decoding ...

    Raises click.UsageError for an option that needs another one, OptionError for a value outside its range."""
    chosen = [each if isinstance(each, Some) else Some(each) for each in groups]
    options = {name: each for some in chosen for name, each in some.options().items()}

    def wrap(command: F) -> F:
        @wraps(command)
        def run(**values: Any) -> Any:
            given = {name: value for name in options if (value := values.pop(name)) is not None}
            given = yielding(given)
            with told_where(given):
                check_usage(given)
                built: dict[str, Any] = {
                    KEYWORDS[some.group]: build(some.group, {**some.defaults, **given}) for some in chosen
                }
                check_greedy(built.get("decoding"), built.get("pruning"))
            return command(**values, **built)

        return cast(F, decorate(run, *options.values()))

    return wrap


def yielding(given: dict[str, Any]) -> dict[str, Any]:
    """Without --greedy, or what asks for sampling, from the user's settings, where the command line says the other."""
    context = click.get_current_context()
    sampling = [name for name in ("temperature", "top_p", "top_k", "seed") if name in given]
    if not given.get("greedy") or not sampling:
        return given
    settings = [name for name in ("greedy", *sampling) if source_of(context, name)]
    if "greedy" in settings and any(name not in settings for name in sampling):
        return {**given, "greedy": False}
    return {n: v for n, v in given.items() if n not in settings} if "greedy" not in settings else given


@contextmanager
def told_where(given: Mapping[str, Any]) -> Iterator[None]:
    """Errors name the file and key, or the variable, of the option that they are about."""
    context = click.get_current_context()
    sources = {name: source for name in given if (source := source_of(context, name))}
    for name, source in sources.items():
        try:
            KNOWN[name][0].check(name, given[name])
        except OptionError as error:
            raise OptionError(f"{source}: {error}") from None
    try:
        yield
    except (click.UsageError, OptionError) as error:
        text = error.message if isinstance(error, click.UsageError) else str(error)
        about = [source for name, source in sources.items() if flag(name) in text or name in text]
        if not about:
            raise
        raise OptionError(f"{text} ({'; '.join(about)})") from None


def check_usage(given: Mapping[str, Any]) -> None:
    """Raises click.UsageError for an option that does nothing without another one."""
    if "prior_weight" in given and (given.get("prior") == OFF or given.get("method")):
        raise click.UsageError("--prior-weight needs --prior auto, or a file")
    if "fold_strength" in given and (given.get("fold") is False or given.get("method")):
        raise click.UsageError("--fold-strength needs --fold")
    of_skip = [name for name, value in given.items() if name.startswith("ffn_skip_") and value != "token"]
    if of_skip and not given.get("ffn_skip"):
        raise click.UsageError(f"{flag(of_skip[0])} needs --ffn-skip SHARE")
    if given.get("ffn_skip_mode") == "prompt" and "ffn_skip_warmup" in given:
        raise click.UsageError("--ffn-skip-warmup needs --ffn-skip-mode token")


def check_greedy(decoding: Decoding | None, pruning: Pruning | None) -> None:
    """Raises click.UsageError where --greedy meets an option that asks for sampling."""
    if decoding and decoding.greedy and (sampling := decoding.sampling(pruning.selection if pruning else "topk")):
        raise click.UsageError(
            f"--greedy takes the likeliest token every time: leave out {', '.join(map(flag, sampling))}"
        )


def given_options() -> list[str]:
    """Names of the options that the command line has."""
    context = click.get_current_context()
    names = [parameter.name or "" for parameter in context.command.params]
    return [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


@dataclass(frozen=True)
class Opening:
    """Opens the engine of a model when it is called."""

    model: str
    placement: Placement

    def __call__(self) -> "Engine":
        return open_engine(self.model, self.placement)


def opens_engine(*, host_memory: bool = False) -> Decorator:
    """Gives a command --model and the options of Placement; it gets `open_engine`, which opens that model.

    `host_memory`: for commands that may answer more than one prompt."""

    def wrap(command: F) -> F:
        @takes(Some(Placement, without=() if host_memory else ("host_memory",)))
        @wraps(command)
        def run(*, model: str, placement: Placement, **values: Any) -> Any:
            return command(open_engine=Opening(model, placement), **values)

        text = "An alias (see `griffin models`), a folder, a hub id or a .gguf file."
        facts: dict[str, Any] = {"metavar": "NAME", "shell_complete": complete_model}
        model = click.option("--model", default=DEFAULT_MODEL, show_default=True, help=text, **facts)
        return cast(F, model(run))

    return wrap


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models known by name, and files."""
    from ..sources.catalogue import CATALOGUE

    names = [name for name in CATALOGUE if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def open_engine(model: str, placement: Placement) -> "Engine":
    """The engine of a model; a bar shows if the model has to be fetched."""
    find(model)  # a name of no model is refused before torch is imported
    from ..engine import Engine
    from ..memory.machine import total_memory

    with console.progress_bytes("Fetching") as on_progress:
        engine = Engine(model, placement, on_progress=on_progress)
    devices = [card.device for card in engine.opened.cards] or [engine.device]
    if placement.device_memory is not None and engine.budget > (there := min(map(total_memory, devices))):
        asked = f"--device-memory {format_bytes(engine.budget)}"
        console.note(f"{asked} is more than the memory of this machine, {format_bytes(there)}: a run may be killed")
    return engine


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


def choice_note(pruning: Pruning, plan: "Plan", dtype: str) -> str | None:
    """What was chosen to fit, where the user left it open; None where not."""
    from ..planning.ladder import describe

    by_prompt = pruning.skip.share and pruning.skip.by_prompt
    if pruning.sparsity is not None and pruning.rest in (None, AUTO) and plan.rest == "drop" and not by_prompt:
        return f"the rest {plan.rest_and_why}"
    if pruning.sparsity is not None or pruning.resident_dtype not in (None, AUTO):
        return None
    if not plan.reads_again:
        return "the whole model fits the device: no offloading needed; nothing is pruned (use --sparsity to prune)"
    if pruning.skip.share and plan.sparsity == 0 and not plan.precision.quantized:
        return None  # all that was asked for, and no more
    kept = describe(plan).replace("bfloat16", dtype)
    return f"to fit {format_bytes(plan.budget)}: {kept} (griffin mem-report --model shows the choices)"


def remember(report: "Report") -> None:
    """Keep the report for `griffin mem-report --last`. A cache that cannot be written is no reason to fail."""
    from ..paths import cache_folder
    from ..report import save_last

    try:
        save_last(report, cache_folder())
    except (OSError, GriffinError) as error:
        console.note(f"the report was not saved for mem-report --last: {error}")
