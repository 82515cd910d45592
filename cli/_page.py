"""`--report`: a run as a page."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GriffinError
from ..files import reason, write_text
from . import _console as console

if TYPE_CHECKING:
    from ..memory.timeline import Sample
    from ..run import Answer

ENDS = {"stop": "the model ended it", "length": "it has as many tokens as were asked for", "interrupted": "Ctrl-C"}


def check_page(path: Path) -> None:
    """Before the run. Raises GriffinError where the page could not be written, or would replace something else."""
    from ..page.page import MARK

    if not path.parent.is_dir():
        raise GriffinError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise GriffinError(f"{path} cannot be written: it is no plain file")
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            ours = MARK in file.read(1000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise GriffinError(f"{path} cannot be written: {reason(error)}") from None
    if not ours:
        raise GriffinError(f"{path} exists and is no report of Griffin's: choose another name")


@contextmanager
def recorded(path: Path | None, device: str) -> "Iterator[Sequence[Sample]]":
    """Samples of the memory while the block runs, if there is to be a page."""
    if path is None:
        yield []
        return
    from ..memory.timeline import Timeline

    with Timeline(device) as timeline:
        samples: list[Sample] = timeline.samples
        yield samples


def write_page(
    path: Path, answer: "Answer", samples: "Sequence[Sample]", prompt: str, settings: Mapping[str, Any]
) -> None:
    """Raises GriffinError."""
    from ..page.page import html_page

    ended = ENDS.get(answer.finish_reason, answer.finish_reason)
    try:
        write_text(path, html_page(answer.report, samples, prompt, answer.text, ended, settings), make_folder=False)
    except OSError as error:
        raise GriffinError(f"{path} cannot be written: {reason(error)}") from None
    console.note(f"the run as a page: {path}")
