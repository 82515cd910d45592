"""`griffin chat`: a conversation at the terminal, or through pipes. Answers alone go to stdout."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import click

from ..chat import Chat
from ..errors import GriffinError
from ..options import Decoding, Pruning
from ..paths import state_folder
from ..sources.resolve import CATALOGUE
from ..units import format_bytes
from . import _console as console
from ._chat_commands import ALIASES, COMMANDS, run, words
from ._options import opens_engine, quiet_option, switch, takes
from ._talk import Talk
from ._text import check_text
from ._typed import Lines, typing

if TYPE_CHECKING:
    from ..engine import Engine
    from ._terminal import Terminal

LEAVE = "Ctrl-D or /exit leaves; /help lists the commands"


@click.command("chat", short_help="Talk to a model, turn by turn.")
@click.option("--system", metavar="TEXT", help="System message, placed before the conversation.")
@switch("--plain", "Show answers as the model writes them, not as Markdown.")
@opens_engine(host_memory=True)
@takes(Pruning, Decoding)
@quiet_option
def command(
    *, system: str | None, plain: bool, open_engine: Callable[[], "Engine"], pruning: Pruning, decoding: Decoding
) -> None:
    """Talk to a model, turn by turn.

    Each turn computes its new tokens, and reads of the model what is not in memory; the line below an answer says so.
    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. With stdin piped, each line is a turn.
    End a line with a backslash to continue it on the next; put a text of several lines between two lines of \"\"\".
    A paste is one message.
    """
    system = check_text(system, "--system") if system is not None else None
    draws = console.is_terminal(sys.stdin) and console.draws(sys.stdout)
    with typing(shown=False) if draws else nullcontext():
        talk = Talk(
            Chat(open_engine(), pruning, decoding, system), terminal=console.is_terminal(sys.stdin), plain=plain
        )
        converse(talk, terminal(talk) if draws else Lines())


def terminal(talk: Talk) -> "Terminal":
    from ._terminal import Terminal

    names = [f"{name} " if command.argument else name for name, command in COMMANDS.items()]
    return Terminal([*names, *ALIASES], partial(words, talk), state_folder() / "history")


def converse(talk: Talk, asks: "Terminal | Lines") -> None:
    """The loop: a message, its answer or its command, until the end."""
    engine = talk.chat.engine
    if not engine.has_chat_template:
        console.note(f"{engine.name} has no chat template: it continues a plain User:/Assistant: transcript")
        for name in CATALOGUE.keys() & {f"{engine.name}{end}" for end in ("-chat", "-instruct", "-it")}:
            console.note(f"for a conversation use --model {name}")
    if asks.terminal:
        console.note(f"{engine.name} on {engine.device}, budget {format_bytes(engine.budget)}. {LEAVE}")
    try:
        while not talk.leaving:
            try:
                text = asks.ask(talk.status)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not asks.terminal:
                    raise
                if isinstance(asks, Lines):
                    click.echo("", err=True)
                console.note(LEAVE)
                continue
            turn(talk, asks, text)
    finally:
        asks.close()
    if isinstance(asks, Lines) and asks.terminal and not talk.leaving:
        click.echo("", err=True)  # the shell's prompt gets its own line


def turn(talk: Talk, asks: "Terminal | Lines", text: str) -> None:
    """Does what a message asks for. What is typed meanwhile waits for the next one."""
    dumb = isinstance(asks, Lines) and asks.terminal
    try:
        with typing(shown=False) if dumb else nullcontext():
            if text.startswith("/"):
                run(talk, text)
            elif text.strip():
                talk.send(text.strip())
    except GriffinError as error:
        console.error(str(error))
    except KeyboardInterrupt:
        console.note(LEAVE)
