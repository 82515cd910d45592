"""`griffin config`: the settings file, the variables, and what they say."""

import json
import os
from typing import Any

import click

from ..errors import GriffinError
from ..paths import config_file
from ._flags import json_option
from ._print import echo
from ._settings import LIBRARY, PREFIX, Setting, as_typed, options_of, settings_of, walk

SECTIONS = "Keys are the options' names: `temperature = 0.7` for all commands, or under [chat] for one."


@click.command("config", short_help="The settings file and the variables, and what they say.")
@json_option()
@click.pass_context
def command(context: click.Context, *, as_json: bool) -> None:
    """Show the settings file, GRIFFIN_... variables, and what they set for which command.

    Every option of every command can stand in the file griffin.toml, at its top for all commands that have it or in a
    section for one command, and in a variable: GRIFFIN_TEMPERATURE, or GRIFFIN_CHAT_TEMPERATURE for one. The command
    line wins over the variables, and they over the file.
    """
    from . import _console as console

    path, rows, unknown = config_file(), in_force(context), unknown_variables(context)
    if as_json:
        told = [dict(zip(("command", "option", "value", "source"), row, strict=True)) for row in rows]
        facts: dict[str, Any] = {"path": str(path), "exists": path.exists(), "settings": told, "unknown": unknown}
        echo(json.dumps(facts, indent=2))
        return
    console.note(f"{path}{'' if path.exists() else ' (not there yet)'}. {SECTIONS}")
    if rows:
        console.table("Settings", ["command", "option", "value", "from"], rows)
    else:
        console.note("nothing is set: every option has its own default")
    for name in unknown:
        console.note(f"{name} is no option of any command")


def in_force(context: click.Context) -> list[tuple[str, str, str, str]]:
    """Command, option, value and source of every setting; one row for all commands where they are the same.

    Raises GriffinError for what is wrong in the file."""
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    groups = root.command.list_commands(root)
    known = {key: option for _, each in walk(root.command, root) for key, option in options_of(each).items()}
    found: dict[Setting, list[str]] = {}
    for path, each in walk(root.command, root):
        options = options_of(each)
        for key, setting in settings_of(each, path, groups, known).items():
            value = as_typed(options[key], setting)
            try:
                options[key].type_cast_value(click.Context(each), value)
            except click.BadParameter as error:
                raise GriffinError(f"{setting.source}: {error.message}") from None
            found.setdefault(Setting(key, setting.shown, setting.source), []).append(" ".join(path))
    named = [(", ".join(p) if len(p) < 4 else f"{len(p)} commands", one) for one, p in found.items()]
    return [(names, one.key, str(one.value), one.source) for names, one in named]


def unknown_variables(context: click.Context) -> list[str]:
    """GRIFFIN_... variables that say nothing."""
    root = context.find_root()
    known = set()
    for path, each in walk(root.command, root):
        own = "_".join(path).upper().replace("-", "_")
        known |= {PREFIX + key.upper() for key in options_of(each)}
        known |= {f"{PREFIX}{own}_{key.upper()}" for key in options_of(each)}
    given = [name for name in os.environ if name.startswith(PREFIX)]
    return sorted(n for n in given if n not in known and not n.removeprefix(PREFIX).startswith(LIBRARY))
