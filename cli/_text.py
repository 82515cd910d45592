"""Text that users give: a prompt, a file, a pipe."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ..errors import PromptError

if TYPE_CHECKING:
    from ..engine import Engine

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class PromptForm:
    """How a prompt is put to the model: after a system text, or `raw`, without the chat template."""

    system: str | None = None
    raw: bool = False

    def encode(self, engine: "Engine", prompt: str) -> list[int]:
        return engine.encode(prompt, system=self.system, raw=self.raw)


def takes_form(command: F) -> F:
    """Gives a command --system and --raw; it gets `form`. Raises click.UsageError for both, PromptError."""

    @click.option("--system", metavar="TEXT", help="System message, placed before the prompt.")
    @click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template.")
    @wraps(command)
    def run(*, system: str | None, raw: bool, **values: Any) -> Any:
        if raw and system is not None:
            raise click.UsageError("--raw cannot be combined with --system, which needs the chat template")
        return command(form=PromptForm(system and check_text(system, "--system"), raw), **values)

    return cast(F, run)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from its one source. One newline at the end of a file or of stdin is not part of the prompt.

    Raises click.UsageError for no source or two, PromptError for an empty or unreadable one."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file both give a prompt: leave one out")
    if prompt is not None:
        text = check_text(prompt, "the prompt")
    elif prompt_file is not None and prompt_file != "-":
        text = read_file(prompt_file)
    else:
        pipe = sys.stdin.buffer if sys.stdin else io.BytesIO()
        if prompt_file is None and (sys.stdin is None or pipe.isatty()):
            raise click.UsageError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe one in")
        text = decode(pipe.read(), "stdin")
    if not text.strip():
        raise PromptError("the prompt is empty: give it some text")
    return text


def read_file(name: str) -> str:
    """A text file, without the newline at its end. Raises PromptError."""
    try:
        with open(name, "rb") as file:
            return decode(file.read(), name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PromptError(f"cannot read the prompt file {name}: {reason.lower()}") from error


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
