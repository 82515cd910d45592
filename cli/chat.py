"""`griffin chat`: a conversation at the terminal, or through pipes. Answers alone go to stdout."""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..chat import Chat, Conversation
from ..errors import GriffinError, OptionError
from ..options import Decoding, Pruning
from ..units import format_bytes
from . import _console as console
from ._options import choice_note, opens_engine, remember, takes
from ._text import check_text
from .generate import stream

if TYPE_CHECKING:
    from ..engine import Engine
    from ..run import Answer

LEAVE = "Ctrl-D or /exit leaves; /help lists the commands"
BLOCK = '"""'
COMMANDS = {  # name -> (argument, what it does); Repl has a method for each
    "/help": ("", "list the commands"),
    "/clear": ("", "forget the conversation; the system text stays"),
    "/undo": ("", "take back the last question and its answer"),
    "/regen": ("", "answer the last question again"),
    "/system": ("[TEXT]", "show or change the system message; 'none' removes it"),
    "/set": ("[NAME VALUE]", "show or change how answers are made; the value 'none' restores the default"),
    "/mem": ("", "memory and speed of the last answer, and what its turn cost"),
    "/save": ("FILE", "save the conversation"),
    "/load": ("FILE", "continue a saved conversation"),
    "/exit": ("", "leave, as Ctrl-D does"),
}


@click.command("chat", short_help="Talk to a model, turn by turn.")
@click.option("--system", metavar="TEXT", help="System message, placed before the conversation.")
@opens_engine(host_memory=True)
@takes(Pruning, Decoding)
def command(*, system: str | None, open_engine: Callable[[], "Engine"], pruning: Pruning, decoding: Decoding) -> None:
    """Talk to a model, turn by turn.

    Each turn computes its new tokens, and reads of the model what is not in memory; the line below an answer says so.
    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. With stdin piped, each line is a turn.
    End a line with a backslash to continue it on the next; put a text of several lines between two lines of \"\"\".
    """
    system = check_text(system, "--system") if system is not None else None
    Repl(Chat(open_engine(), pruning, decoding, system), Reader()).run()


class Reader:
    """User turns from a terminal (with line editing and history) or from a pipe."""

    def __init__(self) -> None:
        self.terminal = console.is_terminal(sys.stdin)
        if self.terminal:
            with suppress(ImportError):  # Windows: the terminal has its own
                import readline  # noqa: F401  importing it gives input() its line editing and history

    def turn(self) -> str:
        """The next turn; "" for an empty line. Raises EOFError at the end."""
        line = self._line("> ")
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line("… "))
            except EOFError:
                break
        return "\n".join(lines).strip()

    def _block(self, line: str) -> str:
        lines: list[str] = []
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            try:
                line = self._line("… ")
            except EOFError:
                line = BLOCK
        lines.append(line.rstrip().removesuffix(BLOCK))
        # White space keeps a text that begins with a slash from being a command.
        return " " + "\n".join(lines).strip()

    def _line(self, sign: str) -> str:
        if self.terminal:
            if not console.is_terminal(sys.stdout):  # the sign is for people; the answers go to a file
                click.echo(sign, nl=False, err=True)
                sign = ""
            return input(sign).encode("utf-8", "replace").decode("utf-8")
        line = sys.stdin.buffer.readline() if sys.stdin else b""
        if not line:
            raise EOFError
        return line.decode("utf-8", errors="replace").rstrip("\r\n")


class Repl:
    """The loop: a turn, its answer or its command, until the end."""

    def __init__(self, chat: Chat, reader: Reader) -> None:
        self.chat, self.reader = chat, reader
        self.last: Answer | None = None
        self.leaving = False

    def run(self) -> None:
        engine = self.chat.engine
        if not engine.has_chat_template:
            console.note(f"{engine.name} has no chat template: it continues a plain User:/Assistant: transcript")
        if self.reader.terminal:
            console.note(f"{engine.name} on {engine.device}, budget {format_bytes(engine.budget)}. {LEAVE}")
        while not self.leaving:
            try:
                text = self.reader.turn()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.reader.terminal:
                    raise
                click.echo("", err=True)
                console.note(LEAVE)
                continue
            try:
                self._turn(text)
            except GriffinError as error:
                click.echo(f"error: {' '.join(str(error).split())}", err=True)
            except KeyboardInterrupt:
                console.note(LEAVE)
        if self.reader.terminal and not self.leaving:
            click.echo("", err=True)  # the shell's prompt gets its own line

    def _turn(self, text: str) -> None:
        if text.startswith("/"):
            name, _, argument = text.partition(" ")
            if name not in COMMANDS:
                raise OptionError(f"no command {name}: there are {' '.join(COMMANDS)}")
            getattr(self, f"_{name[1:]}")(argument.strip())
        elif text.strip():
            self._answer(lambda **callbacks: self.chat.ask(text.strip(), **callbacks))

    def _answer(self, ask: Callable[..., "Answer"]) -> None:
        shown = False

        def on_text(text: str) -> None:
            nonlocal shown
            shown = True
            stream(text)

        try:
            with console.layer_progress() as on_layer:
                answer = ask(on_text=on_text, on_layer=on_layer)
        except KeyboardInterrupt:  # before the first token: later, the engine ends the answer
            if shown:
                click.echo("")
            console.note("stopped before the first token: the question is taken back")
            return
        click.echo("")
        report = answer.report
        if self.last is None and (note := choice_note(self.chat.pruning, report.plan, report.dtype)):
            console.note(note)
        self.last = answer
        console.note(footer(answer))
        if report.warning:
            console.note(as_settings(report.warning))
        remember(answer.report)

    def _help(self, argument: str) -> None:
        console.pairs((f"{name} {what}".strip(), line) for name, (what, line) in COMMANDS.items())
        console.note(f"/set knows {', '.join(self.chat.settings())}.")
        console.note('End a line with \\ to continue it on the next; put a text of several lines between """ and """.')
        console.note("Ctrl-C stops an answer; Ctrl-D leaves.")

    def _clear(self, argument: str) -> None:
        self.chat.conversation.clear()
        console.note("forgot the conversation; the system text stays")

    def _undo(self, argument: str) -> None:
        text = self.chat.conversation.undo()
        console.note("there is nothing to take back" if text is None else f"taken back: {shorten(text)}")

    def _regen(self, argument: str) -> None:
        self._answer(self.chat.regenerate)

    def _system(self, argument: str) -> None:
        if argument:
            self.chat.conversation.system = None if argument.lower() == "none" else argument
        console.note(f"system: {self.chat.conversation.system or 'none'}")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if name and not value.strip():
            raise OptionError("write /set NAME VALUE, or /set alone to see the settings")
        if name:
            self.chat.set(name, value.strip())
        show = self.chat.settings()
        for key in [name] if name else show:
            value = show[key]
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            console.note(f"{key}: {'default' if value is None else shown}")

    def _mem(self, argument: str) -> None:
        if self.last is None:
            console.note(f"no answer yet, nothing is resident; the budget is {format_bytes(self.chat.engine.budget)}")
        else:
            console.report(self.last.report)

    def _save(self, argument: str) -> None:
        path = path_of(argument, "/save")
        self.chat.conversation.save(path)
        console.note(f"saved {len(self.chat.conversation)} messages in {path}")

    def _load(self, argument: str) -> None:
        path = path_of(argument, "/load")
        self.chat.conversation = Conversation.load(path)
        console.note(f"loaded {len(self.chat.conversation)} messages from {path}")

    def _exit(self, argument: str) -> None:
        self.leaving = True


def path_of(argument: str, name: str) -> Path:
    if not argument:
        raise OptionError(f"{name} needs a file name: {name} FILE")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~somebody
        raise OptionError(f"{argument}: {error}") from error


def footer(answer: "Answer") -> str:
    """Speed and memory of one answer, in a line."""
    facts = answer.to_json()
    speed, first = facts["timings"]["decode_tokens_per_s"], facts["timings"]["time_to_first_token_s"]
    parts = [f"{len(answer.token_ids)} tokens"]
    parts += [f"{speed:.1f} tokens/s"] if speed else []  # one token has no speed
    parts += [f"{format_bytes(facts['memory']['resident_bytes'])} resident", f"first token after {first:.2f} s"]
    parts += [f"{answer.report.turn}, {format_bytes(facts['io']['bytes_read'])} read"] if answer.report.turn else []
    parts += [str(answer.report.fidelity)] if answer.report.fidelity else []
    ends = {"length": "cut at max_new_tokens (/set max_new_tokens N)", "interrupted": "stopped"}
    parts += [ends[answer.finish_reason]] if answer.finish_reason in ends else []
    return " · ".join(parts)


def as_settings(text: str) -> str:
    """A text that names flags, with the chat's own way to change them: --rest int4 -> /set rest int4."""
    text = re.sub(r"(--rest \w+) without --method \w+", r"--method none and \1", text)
    return re.sub(r"--(?!device)([a-z-]+)", lambda flag: "/set " + flag[1].replace("-", "_"), text)


def shorten(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
