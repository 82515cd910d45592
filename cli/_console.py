"""Everything about rich: tables on stdout; notes, progress bars and reports on stderr.

A bar shows only where stderr is a terminal. Streams are looked up at each call, so that tests may swap them.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
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
from rich.table import Table
from rich.text import Text

from ..units import format_bytes

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..report import Report

AMOUNT = re.compile(r"|-|[\d.,]+( ?([KMGT]?i?B|%|GB/s))?")
_quiet = False  # whether notes, reports and bars are left out
WIDE = 1000  # columns where there is no terminal: a table takes what it needs and no path is cut


def console(*, err: bool = False) -> Console:
    width = None if is_terminal(sys.stderr if err else sys.stdout) else WIDE
    return Console(stderr=err, width=width, highlight=False, markup=False, emoji=False)


def is_terminal(stream: IO[str] | None) -> bool:
    """False also for a stream that was closed before the program began."""
    return stream is not None and stream.isatty()


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
        console(err=True).print(Text(text, style="dim"), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, err: bool = False) -> None:
    """A titled table on stdout. A column of nothing but amounts is aligned right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
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
        grid.add_row(Text(label, style="dim"), Text(value))
    show(grid, err=err)


def report(value: "Report") -> None:
    """A run's report on stderr."""
    if not _quiet:
        pairs(value.rows())


def plan(value: "Plan", *, err: bool = False) -> None:
    """The predicted peak, row by row, and the budget that it must not pass."""
    from ..planning.rows import MOMENTS

    rows: list[tuple[str, ...]] = [(row.name, format_bytes(row.bytes), row.when, row.note) for row in value.rows]
    moments = {row.when for row in value.rows}
    for moment in (moment for moment in MOMENTS if moment in moments):
        total = sum(row.bytes for row in value.rows if row.when in ("always", moment))
        what = "measurement of the fidelity" if moment == "fidelity" else moment
        rows.append((f"in all during the {what}", format_bytes(total), moment, ""))
    room = value.budget - value.peak
    rows.append(("peak, the largest of these", format_bytes(value.peak), "", ""))
    left = f"{format_bytes(abs(room))} {'to spare' if room >= 0 else 'short'}"
    rows.append(("budget", format_bytes(value.budget), "", left))
    tokens = f"{value.prompt_tokens} tokens of prompt, {value.max_new_tokens} of answer"
    table(f"Plan at {value.sparsity:.0%} sparsity, {tokens}", ("part", "memory", "counts", ""), rows, err=err)


@contextmanager
def progress_bytes(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield update(what, done, total), in bytes. A bar for each `what`, gone when the block ends."""
    if _quiet or not is_terminal(sys.stderr):
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
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
                tasks[what] = bar.add_task(doing[:1].upper() + doing[1:], total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def layer_progress(description: str = "Reading the model") -> Iterator[Callable[[int, int], None]]:
    """Yield on_layer(done, total). The bar goes away with the last layer, so that the answer finds a clean line."""
    if _quiet or not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
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
