"""`griffin chat`: a conversation at the terminal, or through pipes. Answers alone go to stdout."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from ..chat import Chat
from ..errors import CheckpointError, GriffinError, ModelNotFound, PromptError
from ..options import Decoding, Pruning, as_dict
from ..paths import state_folder
from ..sources.resolve import CATALOGUE
from . import _console as console
from ._chat_commands import ALIASES, COMMANDS, rescue, run, save, words
from ._flags import quiet_option, switch
from ._opening import Opening, opens_engine
from ._options import takes
from ._outcome import debugging, describe
from ._print import echo, is_terminal
from ._talk import Talk
from ._text import check_text, refuse_missing_file
from ._typed import Lines, typing
from ._usage import given_options

if TYPE_CHECKING:
    from ..session import Session
    from ._terminal import Terminal

NEWEST = "\0"  # --resume without a name
LEAVE = "Ctrl-D or /exit leaves; /help lists the commands"


@click.command("chat", short_help="Talk to a model, turn by turn.")
@click.option("--system", metavar="TEXT", help="System message, placed before the conversation.")
@switch("--plain", "Show answers as the model writes them, not as Markdown.")
@click.option("--session", metavar="NAME", help="Save the chat under this name when it ends, to go on with later.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value=NEWEST,
    metavar="[NAME]",
    help="Go on with a saved session, by default the newest, and save it again when the chat ends. Its model and its "
    "options are taken, but for those that are given. No prompt is computed again.",
)
@opens_engine(host_memory=True)
@takes(Pruning, Decoding)
@quiet_option
def command(
    *,
    system: str | None,
    plain: bool,
    session: str | None,
    resume: str | None,
    open_engine: Opening,
    pruning: Pruning,
    decoding: Decoding,
) -> None:
    """Talk to a model, turn by turn.

    Each turn computes its new tokens, and reads of the model what is not in memory; the line below an answer says so.
    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. With stdin piped, each line is a turn.
    End a line with a backslash to continue it on the next; put a text of several lines between two lines of \"\"\".
    A paste is one message.
    """
    if system is not None:
        refuse_missing_file(check_text(system, "--system"), "--system")
    check_session(session, resume)
    is_typed = is_terminal(sys.stdin)
    draws = is_typed and console.draws(sys.stdout)
    with typing(shown=False) if draws else nullcontext():
        earlier = None
        if resume is None:
            chat = Chat(open_engine(), pruning, decoding, system)
        else:
            chat, earlier = resumed(None if resume == NEWEST else resume, open_engine, pruning, decoding)
            chat.conversation.system = chat.conversation.system if system is None else system
        talk = Talk(chat, terminal=is_typed, plain=plain)
        talk.session, talk.seen = (earlier.name, earlier.identity) if earlier else (session, None)
        with kept(talk):
            converse(talk, terminal(talk) if draws else Lines())


@contextmanager
def kept(talk: Talk) -> Iterator[None]:
    """The chat is saved when this block ends, if it has a session; where a signal, a fault or a full disk ends it, its
    texts in any case."""
    try:
        try:
            yield
        except KeyboardInterrupt:
            if talk.session:
                save(talk)
            raise
        if talk.session:
            save(talk)
    except KeyboardInterrupt:
        raise
    except BaseException:
        rescue(talk)
        raise


def check_session(session: str | None, resume: str | None) -> None:
    """Raises for options that do not go together, before a model is opened."""
    from ..session import session_path

    if session is not None and resume is not None:
        raise click.UsageError("--resume saves the session again under its name: leave out --session")
    if session is not None and session_path(session).exists():
        raise GriffinError(
            f"the session {session} exists: --resume {session} goes on with it, griffin sessions --delete {session} "
            "removes it"
        )


def resumed(name: str | None, opening: Opening, pruning: Pruning, decoding: Decoding) -> "tuple[Chat, Session]":
    """The chat of a session, with the options that the command line has in place of its own; and the session."""
    from ..session import open_session

    session, given = open_session(name), given_options()
    if "model" not in given:
        opening = replace(opening, model=session.model)
    if opening.placement.dtype is None:
        opening = replace(opening, placement=replace(opening.placement, dtype=session.dtype))
    options = [
        session.options(group, **{name: value for name, value in as_dict(values).items() if name in given})
        for group, values in ((Pruning, pruning), (Decoding, decoding))
    ]
    chat = session.resume(opening(), *options)
    console.note(f"{session.name}: {session.messages} messages, {session.tokens:,} tokens that need not be computed")
    return chat, session


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
        console.note(f"{engine.name} on {engine.opened.where}. {LEAVE}")
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
                    echo(err=True)
                console.note(LEAVE)
                continue
            turn(talk, asks, text)
    finally:
        asks.close()
    if isinstance(asks, Lines) and asks.terminal and not talk.leaving:
        echo(err=True)  # the shell's prompt gets its own line


def turn(talk: Talk, asks: "Terminal | Lines", text: str) -> None:
    """Does what a message asks for. What is typed meanwhile waits for the next one."""
    dumb = isinstance(asks, Lines) and asks.terminal
    talk.asking = False
    try:
        with typing(shown=False) if dumb else nullcontext():
            if text.startswith("/"):
                run(talk, text)
            elif text.strip():
                talk.send(text.strip())
    except KeyboardInterrupt:
        console.note(LEAVE)
    except (SystemExit, BrokenPipeError):  # the process is to end, or nobody reads on
        raise
    except BaseException as error:
        tell(talk, error)


def tell(talk: Talk, error: BaseException) -> None:
    """What went wrong in a turn or a command, after which the chat goes on."""
    if debugging():
        echo("".join(traceback.format_exception(error)), err=True)
    console.error(describe(error) + ("; the message is taken back" if talk.asking and talk.failed else ""))
    if not talk.asking:
        return
    if not isinstance(error, GriffinError | OSError):  # what is resident may be half a turn's
        with suppress(Exception):
            talk.chat.engine.unload()
    if not isinstance(error, PromptError | CheckpointError | ModelNotFound):
        talk.take_back()
