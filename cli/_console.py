"""Everything about rich: tables and answers on stdout; notes, progress bars and reports on stderr.

A bar shows only where stderr is a terminal. Streams are looked up at each call, so that tests may swap them.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, Protocol

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..foreign import ERROR, NAME, printable, sentence, shown
from ..units import format_bytes
from ._print import is_terminal

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..planning.rows import Row
    from ..report import Report

AMOUNT = re.compile(r"|-|[\d.,]+( ?([KMGT]?i?B|%|GB/s))?")
_quiet = False  # whether notes, reports and bars are left out
WIDE = 1000  # columns where there is no terminal: a table takes what it needs and no path is cut


def console(*, err: bool = False) -> Console:
    stream = sys.stderr if err else sys.stdout
    width = None if is_terminal(stream) else WIDE
    return Console(file=stream, stderr=err, width=width, highlight=False, markup=False, emoji=False)


def draws(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal that can draw a line again: not one that is dumb."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")


def show(renderable: RenderableType, *, err: bool = False) -> None:
    """Print; where there is no terminal, without the blanks that rich pads its lines with."""
    screen = console(err=err)
    if screen.is_terminal:
        screen.print(renderable)
        return
    with screen.capture() as captured:
        screen.print(renderable)
    screen.file.writelines(line.rstrip() + "\n" for line in captured.get().rstrip().splitlines())


def be_quiet(quiet: bool) -> None:
    """From now on show no notes, reports and bars, or show them again."""
    global _quiet  # noqa: PLW0603
    _quiet = quiet


def note(text: str) -> None:
    """A line for people, on stderr."""
    if not _quiet:
        console(err=True).print(Text(printable(text), style="dim"))


def error(text: str) -> None:
    """An error that a program goes on after, on stderr."""
    console(err=True).print(Text(f"error: {sentence(text, ERROR)}"))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, err: bool = False) -> None:
    """A titled table on stdout. A column of nothing but amounts is aligned right."""
    cells = [["" if cell is None else shown(cell) for cell in row] for row in rows]
    title = shown(title)
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        amounts = cells and all(AMOUNT.fullmatch(row[index]) for row in cells)
        grid.add_column(column, justify="right" if amounts else "left", overflow="fold")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    show(grid, err=err)


def pairs(rows: Iterable[tuple[str, str]], *, err: bool = True) -> None:
    """Two columns without a frame: label, value."""
    grid = Table.grid(padding=(0, 2))
    for label, value in rows:
        grid.add_row(Text(shown(label), style="dim"), Text(shown(value)))
    show(grid, err=err)


def report(value: "Report") -> None:
    """A run's report on stderr."""
    if not _quiet:
        pairs(value.rows())


def plan(value: "Plan", *, err: bool = False) -> None:
    """The predicted peak, row by row, and the budget that it must not pass; of several devices a table for each."""
    tokens = f"{value.prompt_tokens} tokens of prompt, {value.max_new_tokens} of answer"
    title, columns = f"Plan at {value.sparsity:.0%} sparsity, {tokens}", ("part", "memory", "counts", "")
    for card in value.cards:
        of_card = _plan_rows(card.rows, card.peak, card.card.budget)
        table(f"{title}: {card.card}, {card.layers}", columns, of_card, err=err)
    if not value.cards:
        table(title, columns, _plan_rows(value.rows, value.peak, value.budget), err=err)


def _plan_rows(parts: "Sequence[Row]", peak: int, budget: int) -> list[tuple[str, ...]]:
    """Cells of what is on one device: each part, the moments, and the budget."""
    from ..planning.rows import MOMENTS

    rows: list[tuple[str, ...]] = [(row.name, format_bytes(row.bytes), row.when, row.note) for row in parts]
    moments = {row.when for row in parts}
    for moment in (moment for moment in MOMENTS if moment in moments):
        total = sum(row.bytes for row in parts if row.when in ("always", moment))
        what = "measurement of the fidelity" if moment == "fidelity" else moment
        rows.append((f"in all during the {what}", format_bytes(total), moment, ""))
    rows.append(("peak, the largest of these", format_bytes(peak), "", ""))
    left = f"{format_bytes(abs(budget - peak))} {'to spare' if peak <= budget else 'short'}"
    return [*rows, ("budget", format_bytes(budget), "", left)]


@contextmanager
def progress_bytes(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield update(what, done, total), in bytes. A bar for each `what`, gone when the block ends."""
    if _quiet or not is_terminal(sys.stderr):
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    bar = Progress(*columns, console=console(err=True), transient=True)
    tasks: dict[str, TaskID] = {}
    lock = Lock()  # several files may arrive at once, each in its thread

    def update(what: str, done: int, total: int) -> None:
        with lock:
            if not tasks:
                bar.start()
            if what not in tasks:
                doing = what if what.startswith("converting ") else f"{description} {what}".strip()
                tasks[what] = bar.add_task(shown(doing[:1].upper() + doing[1:], NAME), total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


class Bar(Protocol):
    def __call__(self, **changes: Any) -> None:
        """`completed`: rows that are done; `pace` and `layer`: texts beside the bar."""


@contextmanager
def rows_progress(what: str, total: int, done: int) -> Iterator[Bar | None]:
    """Yield what changes the bar of a long run of rows; None where there is none. Notes go above it."""
    if _quiet or not is_terminal(sys.stderr):
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}", markup=False),
        TextColumn("{task.fields[layer]}", markup=False, style="dim"),
    )
    with Progress(*columns, console=console(err=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(what, total=total, completed=done, pace="", layer="")
        yield lambda **changes: bar.update(task, **changes)


@contextmanager
def layer_progress(description: str = "Reading the model") -> Iterator[Callable[[int, int], None]]:
    """Yield on_layer(done, total). The bar goes away with the last layer, so that the answer finds a clean line."""
    if _quiet or not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    # stdout is left alone: with --json, or in a pipe, it is not the bar's to redirect.
    bar = Progress(*columns, console=console(err=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(description, total=None)

    def on_layer(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield on_layer
    finally:
        bar.stop()


def stream(text: str) -> None:
    """Text to stdout, at once."""
    write(printable(text) if is_terminal(sys.stdout) else text)


def write(text: str) -> None:
    """Text with a terminal's codes, which are ours, to stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()


def columns_of(line: str) -> int:
    """Columns that a line with a terminal's codes takes."""
    return Text.from_ansi(line).cell_len


class _Code(CodeBlock):
    """Without a frame of blanks, which would be copied with the code."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")


class _Heading(Heading):
    """On the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Answer(Markdown):
    """Markdown as models write it: HTML is shown as it is, a line's end stays one, and a link shows its address."""

    elements = {**Markdown.elements, "heading_open": _Heading, "fence": _Code, "code_block": _Code}  # noqa: RUF012

    def __init__(self, markup: str) -> None:
        super().__init__(markup, hyperlinks=False)
        self.parsed = _parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type, child.tag = "hardbreak", "br"
                child.content = printable(child.content)  # Markdown can say a character by its number: &#x202e;
            token.content, token.info = printable(token.content), printable(token.info)


def _parse(markup: str) -> list[Token]:
    parser = MarkdownIt("commonmark", {"html": False})
    return parser.enable(["strikethrough", "table"]).disable("reference").parse(markup)


def finished(markup: str) -> int:
    """How many of its first characters no text that follows can change: all blocks but the last."""
    begins = [token.map[0] for token in _parse(markup) if not token.level and token.map and token.nesting >= 0]
    lines = markup.splitlines(keepends=True)
    return sum(map(len, lines[: begins[-1]])) if len(begins) > 1 else 0


def markdown_lines(markup: str, width: int) -> list[str]:
    """Markdown as lines for a terminal, without the blanks at their ends."""
    if not markup.strip():
        return []
    screen = console()
    with screen.capture() as captured:
        screen.print(_Answer(markup), width=max(1, width))
    return [re.sub(r" +((\x1b\[[\d;]*m)*)$", r"\1", line) for line in captured.get().strip("\n").split("\n")]
