"""Which options of a command go together, and which yield: those of a settings file to those of the command line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from click.core import ParameterSource

from ..errors import OptionError
from ..options import OFF, Decoding, Option, Pruning
from ._flags import flag
from ._settings import source_of


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
def told_where(given: Mapping[str, Any], known: Mapping[str, Option]) -> Iterator[None]:
    """Errors name the file and key, or the variable, of the option that they are about. `known`: by name."""
    context = click.get_current_context()
    sources = {name: source for name in given if (source := source_of(context, name))}
    for name, source in sources.items():
        try:
            known[name].check(name, given[name])
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
