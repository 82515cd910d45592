"""Defaults of options from the user's griffin.toml and from GRIFFIN_... variables.

What stands further up wins: the command line, GRIFFIN_CHAT_TEMPERATURE, GRIFFIN_TEMPERATURE, `temperature` under [chat]
in the file, `temperature` at its top, the option's own default. A value means what it means on the command line."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from ..errors import GriffinError
from ..files import reason
from ..inputs import read_input
from ..options import parse_switch
from ..paths import config_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "GRIFFIN_"
LIBRARY = ("CACHE", "CONFIG", "CPU", "DEBUG", "DEVICE", "STATE", "TEST_")  # variables that the library itself reads
SECRET = ("api_key",)
NOT_SHARED = {("mem-report", "model")}  # what the option says changes what the command does: its own section only
META = "griffin.settings"


@dataclass(frozen=True)
class Setting:
    """A value that is not on the command line: of the option `key`, as written at `source`."""

    key: str
    value: Any
    source: str

    @property
    def shown(self) -> str:
        return "(set)" if self.key in SECRET else str(self.value)


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by their long names: max_new_tokens, json."""
    found = {}
    for each in command.params:
        if isinstance(each, click.Option) and not each.hidden:
            name = next((flag for flag in each.opts if flag.startswith("--")), "")
            if name:
                found[name[2:].replace("-", "_")] = each
    return found


class File:
    """The user's griffin.toml, read. Raises GriffinError, in one line with the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, Any] = {}
        try:
            self._content = tomllib.loads(read_input(path).decode("utf-8"))
        except FileNotFoundError:
            if os.environ.get(f"{PREFIX}CONFIG"):
                raise GriffinError(f"{PREFIX}CONFIG names {path}, which is not there") from None
        except (OSError, ValueError, RecursionError) as error:
            raise GriffinError(f"{path} cannot be read: {reason(error)}") from None

    def at(self, command: tuple[str, ...]) -> dict[str, Any]:
        """What a command's own section says, its names with _; ('eval', 'choice') is [eval.choice]."""
        section: Any = self._content
        for name in command:
            section = section.get(name, {})
            if not isinstance(section, dict):
                raise self.wrong((), name, "is a command: write it as a section")
        return {name.replace("-", "_"): value for name, value in section.items()}

    def wrong(self, command: tuple[str, ...], key: str, message: str) -> GriffinError:
        return GriffinError(f"{self.source(command, key)} {message}")

    def source(self, command: tuple[str, ...], key: str) -> str:
        section = f"[{'.'.join(command)}] " if command else ""
        return f"{self.path}: {section}{key}"


def settings_of(
    command: click.Command, path: tuple[str, ...], groups: Iterable[str], known: "Mapping[str, Any]"
) -> dict[str, Setting]:
    """What holds for a command, by the long names of its options. `path`: its name, without griffin; `groups`: names of
    all commands; `known`: keys that may stand at the file's top for other commands. Raises GriffinError."""
    file, options = File(config_file()), options_of(command)
    found: dict[str, Setting] = {}
    for depth in range(len(path) + 1):
        place = path[:depth]
        for key, value in file.at(place).items():
            if isinstance(value, dict):
                if not place and key.replace("_", "-") not in groups:
                    raise file.wrong(place, key, unknown(key, "command of griffin", groups))
            elif key in options and shared(path, key, len(place)):
                found[key] = Setting(key, value, file.source(place, key))
            elif not place and key.replace("_", "-") in groups:
                raise file.wrong(place, key, "is a command: write it as a section")
            elif key not in options and (depth == len(path) or key not in known):
                what = f"option of griffin {' '.join(place)}" if place else "option of any command"
                raise file.wrong(place, key, unknown(key, what, options if place else known))
    for prefix in (PREFIX, PREFIX + "_".join(path).upper().replace("-", "_") + "_"):
        for key in options:
            name = prefix + key.upper()
            reserved = prefix == PREFIX and (key.upper() in LIBRARY or not shared(path, key, 0))
            if not reserved and (text := os.environ.get(name)):
                found[key] = Setting(key, text, name)
    return found


def shared(path: tuple[str, ...], key: str, depth: int) -> bool:
    """Whether a setting at that depth of the file holds for an option."""
    return depth == len(path) or (path[-1], key) not in NOT_SHARED


def unknown(key: str, what: str, names: Iterable[str]) -> str:
    near = get_close_matches(key, list(names), 1)
    return f"is no {what}" + (f"; is it {near[0]}?" if near else "")


def default_map(command: click.Command, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Values as click takes them from the command line, by its own names. Raises GriffinError for one of a type that no
    command line could say."""
    options = options_of(command)
    return {str(options[key].name): as_typed(options[key], setting) for key, setting in settings.items()}


def as_typed(option: click.Option, setting: Setting) -> Any:
    value = setting.value
    if option.is_flag:
        try:
            return value if isinstance(value, bool) else parse_switch(str(value))
        except ValueError:
            raise GriffinError(f"{setting.source} is on or off: true or false, not {value!r}") from None
    if isinstance(value, list) and all(is_plain(each) for each in value):
        if option.multiple:
            return tuple(str(each) for each in value)
        if getattr(option.type, "name", "") in ("share", "pair"):
            return ",".join(map(str, value))
    if not is_plain(value):
        raise GriffinError(f"{setting.source} cannot be {value!r}: write what the command line takes")
    if option.multiple:  # a text may have blanks; names have none
        return (str(value),) if option.metavar == "TEXT" else tuple(str(value).split())
    return str(value)


def is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and "\0" not in str(value)


def apply(context: click.Context, name: str, command: click.Command, groups: Iterable[str]) -> None:
    """Before `command`, called `name`, is parsed below a context: its settings become its defaults."""
    root = context.find_root()
    path = (*context.command_path.split()[1:], name)
    settings = settings_of(command, path, groups, _Known(root))
    context.default_map = {name: default_map(command, settings)}
    options = options_of(command)
    root.meta[META] = {str(options[key].name): setting for key, setting in settings.items()}


class _Known(Mapping[str, Any]):
    """Keys of all commands' options, read when they are asked for: that imports every command."""

    def __init__(self, root: click.Context) -> None:
        self._root, self._found = root, dict[str, Any]()

    def _all(self) -> dict[str, Any]:
        if not self._found:
            for each in walk(self._root.command, self._root):
                self._found |= options_of(each[1])
        return self._found

    def __getitem__(self, key: str) -> Any:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def walk(
    group: click.Command, context: click.Context, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, with its name."""
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            yield from walk(command, context, (*path, name))
        else:
            yield (*path, name), command


def source_of(context: click.Context | None, parameter: str | None) -> str | None:
    """Where the value of a parameter stands, if it is a setting."""
    if context is None or parameter is None:
        return None
    if context.get_parameter_source(parameter) is not click.core.ParameterSource.DEFAULT_MAP:
        return None
    setting = context.find_root().meta.get(META, {}).get(parameter)
    return setting.source if setting else None
