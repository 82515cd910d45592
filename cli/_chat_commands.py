"""What a line that begins with a slash does in a chat."""

import difflib
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from ..chat import Conversation
from ..errors import GriffinError, OptionError
from ..files import reason, write_text
from ..options import ALLOCATIONS, AUTO, RESIDENT_DTYPES, RESTS, SELECTIONS
from ..paths import expand
from ..units import format_bytes
from . import _console as console
from ._talk import Talk, shown_value
from ._text import read_file
from ._typed import typing


@dataclass(frozen=True)
class Command:
    """`argument`, as help shows it; what the command does, in a line; and how."""

    argument: str
    line: str
    run: Callable[[Talk, str], None]


def run(talk: Talk, text: str) -> None:
    """Does what a line says. Raises GriffinError."""
    name, _, argument = text.partition(" ")
    name = name.lower()
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.7)
        meant = f"did you mean {close[0]}? " if close else ""
        raise OptionError(f"no command {name}: {meant}there are {' '.join(COMMANDS)}")
    COMMANDS[name].run(talk, argument.strip())


def words(talk: Talk, name: str, argument: str) -> Iterable[str] | None:
    """What may follow a command, beyond the last blank of its argument; None: the name of a file."""
    if name == "/help":
        return list(COMMANDS)
    if name == "/think":
        return ("on", "off")
    if name == "/set":
        setting, blank, _ = argument.partition(" ")
        return VALUES.get(setting, ()) if blank else [f"{each} " for each in talk.chat.settings()]
    return None if name in ("/read", "/save", "/load", "/export") else ()


VALUES = {  # of settings that have few
    "rest": (AUTO, *RESTS, "none"),
    "resident_dtype": (AUTO, *RESIDENT_DTYPES, "none"),
    "selection": SELECTIONS,
    "allocation": ALLOCATIONS,
    "greedy": ("on", "off"),
    "no_fidelity": ("on", "off"),
    "fold": ("on", "off", "none"),
}


def _help(talk: Talk, argument: str) -> None:
    if argument:
        name = "/" + argument.lower().lstrip("/")
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            raise OptionError(f"no command {name}: there are {' '.join(COMMANDS)}")
        console.pairs([(f"{name} {COMMANDS[name].argument}".strip(), COMMANDS[name].line)])
        return
    console.pairs((f"{name} {each.argument}".strip(), each.line) for name, each in COMMANDS.items())
    console.note(f"/set knows {', '.join(talk.chat.settings())}.")
    console.note('End a line with \\ to continue it on the next; put a text of several lines between """ and """.')
    if talk.terminal:
        console.note("A paste is one message. Tab completes, Ctrl-R searches what was typed, Alt-Enter begins a line.")
    console.note("Ctrl-C stops an answer; Ctrl-D leaves.")


def _clear(talk: Talk, argument: str) -> None:
    talk.chat.conversation.clear()
    talk.read, talk.failed = "", None
    console.note("forgot the conversation; the system text stays")


def _undo(talk: Talk, argument: str) -> None:
    text = talk.chat.conversation.undo()
    console.note("there is nothing to take back" if text is None else f"taken back: {shorten(text)}")


def _retry(talk: Talk, argument: str) -> None:
    talk.retry()


def _edit(talk: Talk, argument: str) -> None:
    if not talk.terminal:
        raise OptionError("/edit needs a terminal: write the text here")
    try:
        with typing(shown=True):
            text = click.edit(argument or None, require_save=False)
    except click.ClickException as error:
        raise GriffinError(f"{error.format_message()}; EDITOR names an editor") from error
    if text is None or not text.strip():
        console.note("nothing was written, so nothing is asked")
        return
    console.note(f"asked: {shorten(text)}")
    talk.send(text.strip())


def _read(talk: Talk, argument: str) -> None:
    if not argument:
        raise OptionError("/read needs a file name: /read FILE, or /read FILE QUESTION")
    name, question = argument, ""
    if not os.path.isfile(os.path.expanduser(argument)):
        with suppress(ValueError):  # a quotation mark alone
            name = shlex.split(argument)[0]
            question = argument.partition(" ")[2] if argument.startswith(name) else " ".join(shlex.split(argument)[1:])
    text = read_file(str(path_of(name, "/read")))
    if not text.strip():
        raise GriffinError(f"{name} is empty")
    talk.read = "\n\n".join(part for part in (talk.read, text) if part)
    console.note(
        f"read {len(text):,} characters of {name}" + ("" if question else ": they go before your next message")
    )
    if question:
        talk.send(question)


def _system(talk: Talk, argument: str) -> None:
    if argument:
        talk.chat.conversation.system = None if argument.lower() == "none" else argument
    console.note(f"system: {talk.chat.conversation.system or 'none'}")


def _set(talk: Talk, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name:
        name = talk.chat.setting(name)
    if value.strip():
        talk.chat.set(name, value.strip())
    settings = talk.chat.settings()
    for key in [name] if name else settings:
        console.note(f"{key}: {shown_value(settings[key])}".replace("\n", "\\n"))


def _think(talk: Talk, argument: str) -> None:
    if argument.lower() not in ("", "on", "off"):
        raise OptionError(f"/think is on or off, not {argument}")
    if argument:
        talk.shows_thinking = argument.lower() == "on"
    console.note(f"thinking is {'shown, dim' if talk.shows_thinking else 'folded to a line'}")


def _mem(talk: Talk, argument: str) -> None:
    if talk.last is None:
        console.note(f"no answer yet, nothing is resident; the budget is {format_bytes(talk.chat.engine.budget)}")
    else:
        console.report(talk.last.report)


def _save(talk: Talk, argument: str) -> None:
    path = path_of(argument, "/save")
    talk.chat.conversation.save(path)
    console.note(f"saved {len(talk.chat.conversation)} messages in {path}")


def _load(talk: Talk, argument: str) -> None:
    path = path_of(argument, "/load")
    talk.chat.conversation = Conversation.load(path)
    console.note(f"loaded {len(talk.chat.conversation)} messages from {path}")


def _export(talk: Talk, argument: str) -> None:
    path = path_of(argument, "/export")
    if path.exists():
        raise GriffinError(f"{path} exists: choose another name")
    try:
        write_text(path, talk.chat.conversation.to_markdown(), make_folder=False)
    except (OSError, ValueError) as error:
        raise GriffinError(f"cannot write {path}: {reason(error)}") from error
    console.note(f"wrote {len(talk.chat.conversation)} messages to {path}, to be read")


def _session(talk: Talk, argument: str) -> None:
    from ..session import session_path

    if argument.lower() == "none":
        talk.session = None
    elif argument:
        if argument != talk.session and session_path(argument).exists():
            raise GriffinError(f"the session {argument} exists: griffin sessions --delete {argument} removes it")
        talk.session = save(talk, argument)
        return
    told = f"{talk.session}, saved when the chat ends" if talk.session else "none: /session NAME saves it"
    console.note(f"session: {told}")


def save(talk: Talk, name: str | None = None) -> str | None:
    """Saves the chat as a session, by default the one that it has. Returns its name; None: there is nothing to save."""
    from ..session import free_name, save_session

    name = name or talk.session
    assert name
    if not len(talk.chat.conversation):
        console.note(f"nothing was said, so the session {name} is not saved")
        return None
    own = free_name(name, talk.seen if name == talk.session else None)
    if own != name:
        console.note(f"another chat has saved the session {name} meanwhile: this one gets a name of its own")
    session = save_session(talk.chat, own)
    talk.session, talk.seen = own, session.identity
    kept = f"{session.tokens:,} tokens" if session.tokens else "without its KV cache, which nothing could go on from"
    size = format_bytes(session.bytes)
    console.note(f"saved the session: {session.messages} messages, {kept}, {size}; griffin chat --resume {own}")
    return own


def rescue(talk: Talk) -> None:
    """Saves the texts of a chat that ends unasked, at once: as its session, or as one that gets a name; where that
    cannot be written, in the folder for temporary files. Says where. Raises nothing."""
    from ..session import free_name, save_session

    if not len(talk.chat.conversation):
        return
    new = time.strftime("rescued-%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    told = "cannot be saved"
    try:
        for name in dict.fromkeys((talk.session or new, new)):
            with suppress(Exception):
                own = free_name(name, talk.seen if name == talk.session else None)
                save_session(talk.chat, own, cache=False)
                told = f"is saved: griffin chat --resume {own} goes on with it"
                return
        with suppress(Exception):
            path = Path(tempfile.gettempdir()) / f"griffin-{new}.json"
            talk.chat.conversation.save(path)
            told = f"is saved: /load {path} goes on with it"
    finally:
        with suppress(OSError, ValueError):  # the terminal may be gone
            console.error(f"the chat has ended; its conversation of {len(talk.chat.conversation)} messages {told}")
            if talk.failed:
                console.note(f"not answered: {shorten(talk.failed)}")


def _exit(talk: Talk, argument: str) -> None:
    talk.leaving = True


COMMANDS = {
    "/help": Command("[COMMAND]", "list the commands", _help),
    "/clear": Command("", "forget the conversation; the system text stays", _clear),
    "/undo": Command("", "take back the last question and its answer", _undo),
    "/retry": Command("", "ask again what got no answer, or answer the last question again (also /regen)", _retry),
    "/edit": Command("[TEXT]", "write a message in $EDITOR", _edit),
    "/read": Command("FILE [QUESTION]", "put a file's text before the question, or before the next message", _read),
    "/system": Command("[TEXT]", "show or change the system message; 'none' removes it", _system),
    "/set": Command(
        "[NAME [VALUE]]", "show or change how answers are made; the value 'none' restores the default", _set
    ),
    "/think": Command("[on|off]", "show what the model thinks before it answers, or fold it to a line", _think),
    "/mem": Command("", "memory and speed of the last answer, and what its turn cost", _mem),
    "/save": Command("FILE", "save the conversation's texts as JSON", _save),
    "/load": Command("FILE", "continue a saved conversation", _load),
    "/export": Command("FILE", "write the conversation as Markdown, to be read", _export),
    "/session": Command(
        "[NAME]", "save the chat now and when it ends, for --resume; 'none': not when it ends", _session
    ),
    "/exit": Command("", "leave, as Ctrl-D does (also /quit, /bye)", _exit),
}
ALIASES = {"/regen": "/retry", "/quit": "/exit", "/bye": "/exit", "/?": "/help"}


def path_of(argument: str, name: str) -> Path:
    if not argument:
        raise OptionError(f"{name} needs a file name: {name} FILE")
    return expand(argument)


def shorten(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
