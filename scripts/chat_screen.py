"""Draws a chat at a terminal as an SVG: python scripts/chat_screen.py --out docs/figures/chat.svg

A griffin process runs on a pseudo terminal, is told the lines below, and its screen is drawn by rich."""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

LINES = (
    "How do I reverse a list in Python? Show two ways, shortly.",
    "/retry",
)
COLUMNS, ROWS, PATIENCE = 100, 44, 600
RUN = "from griffin_offload.cli.main import main; main()"


class Screen(pyte.Screen):
    """Shows dim text in grey."""

    def select_graphic_rendition(self, *attrs: int, **options: bool) -> None:
        changed = [each for code in attrs for each in ((2, 90) if code == 2 else (22, 39) if code == 22 else (code,))]
        super().select_graphic_rendition(*changed, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", help="What the title calls the model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--line", action="append", help="What is typed.")
    asked = parser.parse_args()
    options = ["--greedy", "--max-new-tokens", "200", "--sparsity", "0.5"]
    screen = Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    process = pexpect.spawn(
        sys.executable,
        ["-c", RUN, "chat", "--model", asked.model, *options],
        dimensions=(ROWS, COLUMNS),
        env={**os.environ, "TERM": "xterm-256color"},
    )
    for line in [*(asked.line or LINES), ""]:
        until_prompt(process, screen, stream)
        process.send(f"{line}\r" if line else "")
    draw(screen, f"griffin chat --model {asked.name or asked.model} {' '.join(options)}", asked.out)
    process.close(force=True)


def until_prompt(process: pexpect.spawn, screen: pyte.Screen, stream: pyte.ByteStream) -> None:
    """Reads on until an empty prompt stands above the status line."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            stream.feed(process.read_nonblocking(65536, timeout=0.5))
        except pexpect.TIMEOUT:
            lines = [line.rstrip() for line in screen.display if line.strip()]
            if len(lines) > 1 and lines[-2] == ">" and " tokens" in lines[-1]:
                return
    raise SystemExit("no prompt came:\n" + "\n".join(screen.display))


def draw(screen: pyte.Screen, title: str, out: Path) -> None:
    text = Text()
    for row in range(max(row for row, line in enumerate(screen.display) if line.strip()) + 1):
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            text.append(cell.data, style(cell))
        text.append("\n")
    form = re.sub(r" *@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # nothing is fetched
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, color_system="truecolor", force_terminal=True)
        console.print(text, end="")
        out.write_text(console.export_svg(title=title, code_format=form))


def style(cell: Any) -> str:
    """rich's words for a cell of the screen."""
    words = ["bold"] * cell.bold + ["italic"] * cell.italics + ["underline"] * cell.underscore
    if cell.fg != "default":
        is_number = re.fullmatch("[0-9a-f]{6}", cell.fg)
        name = cell.fg.replace("brown", "yellow").replace("bright", "bright_")
        words.append(f"#{cell.fg}" if is_number else name)
    return " ".join(words)


if __name__ == "__main__":
    main()
