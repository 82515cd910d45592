"""Text that users give: a prompt, a file, a pipe."""

import io
import os
import re
import select
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import click

from ..errors import PromptError
from ..files import reason
from ..inputs import PROMPT, TEXT, read_input
from ..many.rows import PromptForm
from ..units import MIB, format_bytes
from . import _console as console

if TYPE_CHECKING:
    from ..run import Answer

ENDING = re.compile(r"[^.]\.[A-Za-z][A-Za-z0-9]{0,5}$")
F = TypeVar("F", bound=Callable[..., Any])


def takes_form(command: F) -> F:
    """Gives a command --system and --raw; it gets `form`. Raises click.UsageError for both, PromptError."""

    @click.option("--system", metavar="TEXT", help="System message, placed before the prompt.")
    @click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template.")
    @wraps(command)
    def run(*, system: str | None, raw: bool, **values: Any) -> Any:
        if raw and system is not None:
            raise click.UsageError("--raw cannot be combined with --system, which needs the chat template")
        if system:
            refuse_missing_file(check_text(system, "--system"), "--system")
        return command(form=PromptForm(system, raw), **values)

    return cast(F, run)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from its source; a text that is piped in goes before the one that is given. One newline at the end of
    a file or of stdin is not part of the prompt.

    Raises click.UsageError for no source or two, PromptError for an empty or unreadable one."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file both give a prompt: leave one out")
    if prompt is not None:
        text = "\n\n".join(part for part in (piped_text(), check_text(prompt, "the prompt")) if part.strip())
    elif prompt_file is not None and prompt_file != "-":
        text = read_file(prompt_file, PROMPT)
    else:
        pipe = sys.stdin.buffer if sys.stdin else io.BytesIO()
        if prompt_file is None and (sys.stdin is None or pipe.isatty()):
            raise click.UsageError("no prompt: give TEXT, --prompt TEXT or --prompt-file FILE, or pipe one in")
        text = _piped(pipe)
    if not text.strip():
        raise PromptError("the prompt is empty: give it some text")
    return text


def piped_text(patience: float = 3.0) -> str:
    """What a pipe or a file at stdin holds; "" where there is none. Says so if nothing has come in `patience` s."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    pipe = sys.stdin.buffer
    try:
        mode = os.fstat(pipe.fileno()).st_mode
    except (OSError, ValueError):  # no file of the system's: a program runs the command within itself
        with suppress(OSError):
            return _piped(pipe)
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    if not select.select([pipe], [], [], patience)[0]:
        console.note("waiting for the end of stdin, which goes before the prompt (< /dev/null leaves it out)")
    return _piped(pipe)


def _piped(pipe: BinaryIO) -> str:
    """The text that comes through a pipe. Raises PromptError for more than a prompt can be."""
    content = bytearray()
    while piece := pipe.read(MIB):
        content += piece
        if len(content) > PROMPT:
            raise PromptError(f"stdin gives more than {format_bytes(PROMPT)}, the most that is read as a prompt")
    return decode(bytes(content), "stdin")


def looks_like_a_file(text: str) -> bool:
    """Whether a text is rather the name of a file than a prompt: without white space, such as p.txt or notes/p."""
    return not re.search(r"\s", text) and bool(os.sep in text or ENDING.search(text))


def refuse_missing_file(text: str, flag: str, way_out: str = "") -> None:
    """Raises PromptError for a text that looks like a file's name where there is no such file."""
    if looks_like_a_file(text) and not os.path.exists(text):
        raise PromptError(
            f"there is no file {text}: {way_out or f'{flag} takes a text'}; if this is the text, put a space before it"
        )


def ending(answer: "Answer", asked: int, context: int, longer: str) -> str | None:
    """How an answer ended, where a reader would wonder: cut at `asked` tokens or by the context, or empty."""
    tokens = len(answer.token_ids)
    if answer.finish_reason == "length":
        full = answer.report.plan.max_new_tokens < asked
        return f"cut after {tokens} tokens: " + (f"the context of {context} tokens is full" if full else longer)
    return "empty: the model ended its answer at once" if not answer.text.strip() else None


def read_file(name: str, limit: int = TEXT) -> str:
    """A text file of at most `limit` bytes, without the newline at its end. Raises PromptError."""
    try:
        return decode(read_input(name, limit, pipe=True), name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PromptError(f"cannot read the prompt file {name}: {reason(error)}") from error


def decode(content: bytes, source: str) -> str:
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    return text.removesuffix("\n")


def check_text(text: str, what: str) -> str:
    """Text from the command line, which may hold bytes that are no characters. Raises PromptError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{what} is not UTF-8 text (character {error.start})") from error
    return text
