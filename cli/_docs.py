"""docs/commands.md, made of the commands themselves: `make docs`, or python -m griffin_offload.cli._docs."""

import re
from collections.abc import Iterator, Sequence
from inspect import cleandoc

import click

from ._chat_commands import COMMANDS
from ._print import echo
from .main import griffin

HEAD = """# The commands

Made by `make docs` from the commands themselves; `griffin COMMAND --help` says the same. Sizes are given as `4GiB`,
`4900MB` or bytes. Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 70 a fault of Griffin's own (one
line that asks for a report; `GRIFFIN_DEBUG=1` shows the traceback), 130 interrupted, 143 and 129 ended by SIGTERM and
SIGHUP.
"""
DEFAULT = re.compile(r" *\[default: (.*)\]$")


def document() -> str:
    """The whole file."""
    sections = [HEAD, *(section(*each) for each in commands(griffin, "griffin"))]
    return "\n".join(sections)


def commands(group: click.Group, name: str) -> Iterator[tuple[click.Command, str]]:
    """Every command below a group, with its full name: a group's own commands follow it."""
    context = click.Context(group)
    for each in group.list_commands(context):
        command = group.get_command(context, each)
        assert command is not None
        yield command, f"{name} {each}"
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {each}")


def section(command: click.Command, name: str) -> str:
    """Heading, help and a table of options."""
    level = "#" * len(name.split())
    usage = " ".join([name, *command.collect_usage_pieces(click.Context(command))])
    parts = [f"{level} {name}", f"`{usage}`", cleandoc(command.help or "")]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    if options:
        parts.append(table(("option", "default", ""), [cells(each) for each in options]))
    if name == "griffin chat":
        rows = [(f"`{f'{name} {each.argument}'.strip()}`", each.line) for name, each in COMMANDS.items()]
        parts += ["Within a chat:", table(("command", ""), rows), SET]
    return "\n\n".join(parts) + "\n"


SET = (
    "`/set` changes the options of the table above from `--sparsity` on, by the same names: `/set max_new_tokens 500`, "
    "`/set ffn_skip 0.25`."
)


def cells(each: click.Option) -> tuple[str, str, str]:
    """Flag, default, help."""
    choices = each.type.choices if isinstance(each.type, click.Choice) else ()
    value = "" if each.is_flag else each.metavar or "|".join(map(str, choices)) or each.type.name.upper()
    flag = " / ".join([*each.opts, *each.secondary_opts])
    text = each.help or ""
    found = DEFAULT.search(text)
    default = found[1] if found else "required" if each.required else ""
    if each.show_default and not found:
        values = each.default if isinstance(each.default, tuple | list) else (each.default,)
        default = ", ".join(map(str, values))
    return f"`{f'{flag} {value}'.strip()}`", default, DEFAULT.sub("", text)


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    echo(document(), end="")
