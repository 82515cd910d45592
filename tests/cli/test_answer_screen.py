"""An answer drawn on a terminal while it comes: what is there at the end, once, however its pieces fall."""

import random
import sys
import time
from types import SimpleNamespace

import pyte
import pytest
from griffin_offload.cli import _console as console
from griffin_offload.cli._answer_screen import AnswerScreen
from griffin_offload.cli._thinking import Parting, open_mark

MARKDOWN = """# A title

A paragraph with **bold**, `code` and a [link](http://x.y).
Its second line, <b>not HTML</b>.

1. one
2. two
   - nested, with a text that is long enough to go on in another line of a narrow screen
3. three

```python
def f(x):
    return x  # [not a link]
```

| a | b |
|---|---|
| 1 | 2 |

> quoted
> text

<div>raw</div>

last *words*
"""


class Screen:
    """A terminal as stdout, and what it shows."""

    encoding = "utf-8"

    def __init__(self, columns: int, rows: int) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.01)
        self.stream, self.written = pyte.Stream(self.screen), ""

    def write(self, text: str) -> int:
        self.written += text
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """Everything, what was scrolled away first."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*above, *self.screen.display)).rstrip().split("\n")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Screen:
    columns, rows = getattr(request, "param", (60, 24))
    made = Screen(columns, rows)
    monkeypatch.setattr(console, "sys", SimpleNamespace(stdout=made, stderr=sys.stderr))
    for name, value in {"COLUMNS": columns, "LINES": rows, "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(AnswerScreen, "EVERY", 0.0)  # draw with every piece
    return made


def pieces(text: str, seed: int) -> list[str]:
    draw, found = random.Random(seed), []
    while text:
        size = draw.randint(1, 12)
        found.append(text[:size])
        text = text[size:]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("screen", [(60, 24), (40, 10), (25, 5)], indirect=True)
def test_an_answer_stands_there_once_however_its_pieces_fall(screen: Screen, seed: int) -> None:
    answer = AnswerScreen()
    for piece in pieces(MARKDOWN, seed):
        answer.reply(piece)
    answer.close()
    drawn = screen.lines
    fresh = Screen(screen.screen.columns, screen.screen.lines)
    for line in console.markdown_lines(MARKDOWN, screen.screen.columns - 1):
        fresh.write(f"{line}\n")
    assert [line for line in drawn if line] == [line for line in fresh.lines if line]
    assert "• nested" in " ".join(drawn)
    assert "<div>raw</div>" in " ".join(drawn)
    assert screen.screen.cursor.x == 0


def test_lines_of_a_verse_and_what_stands_between_blocks(screen: Screen) -> None:
    answer = AnswerScreen()
    for piece in pieces("Roses are red\nViolets are blue\n\nThe end", 1):
        answer.reply(piece)
    answer.close()
    assert screen.lines == ["Roses are red", "Violets are blue", "", "The end"]


@pytest.mark.parametrize("screen", [(30, 8)], indirect=True)
def test_a_block_taller_than_the_screen_shows_its_end_and_is_whole_at_last(screen: Screen) -> None:
    answer = AnswerScreen()
    answer.reply("```\n")
    for number in range(30):
        answer.reply(f"line {number}\n")
        assert f"line {number}" in screen.lines[-1]
        assert len(screen.lines) <= 8, "nothing unfinished is scrolled away"
    answer.reply("```\n")
    answer.close()
    assert screen.lines == [f"line {number}" for number in range(30)]


def test_a_screen_that_becomes_narrower_shows_nothing_twice(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = AnswerScreen()
    answer.reply("word " * 11)
    monkeypatch.setenv("COLUMNS", "30")
    broken = [screen.lines[0][:30], screen.lines[0][30:]]  # as a terminal that breaks its lines anew has it
    screen.screen.resize(24, 30)
    screen.screen.reset()
    screen.write("\n".join(broken))
    answer.reply("end")
    answer.close()
    assert " ".join(screen.lines).split() == ["word"] * 11 + ["end"]


def test_a_model_cannot_command_the_terminal(screen: Screen) -> None:
    for markdown in (True, False):
        answer = AnswerScreen(markdown=markdown)
        answer.reply("a\x1b]0;title\x07\x1b[2Jb\x9bc")
        answer.close()
    assert "\x1b]0" not in screen.written
    assert "\x1b[2J" not in screen.written
    assert "\x9b" not in screen.written


def test_no_colour_where_none_is_wanted(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = AnswerScreen()
    answer.reply(MARKDOWN)
    answer.close()
    assert "\x1b[3" in screen.written
    monkeypatch.setenv("NO_COLOR", "1")
    screen.written = ""
    answer = AnswerScreen()
    answer.reply(MARKDOWN)
    answer.close()
    assert "\x1b[3" not in screen.written.replace("\x1b[3m", "")  # italic is no colour


def test_plain_is_as_the_model_wrote_it(screen: Screen) -> None:
    answer = AnswerScreen(markdown=False)
    for piece in pieces("# One **two**\n1. x", 2):
        answer.reply(piece)
    answer.close()
    assert screen.lines == ["# One **two**", "1. x"]
    assert screen.screen.cursor.x == 0


@pytest.mark.parametrize("markdown", [True, False])
@pytest.mark.parametrize("folds", [True, False])
def test_thinking_is_dim_or_folded(screen: Screen, markdown: bool, folds: bool) -> None:
    answer = AnswerScreen(folds=folds, markdown=markdown)
    part = Parting(answer.thinking, answer.reply)
    for piece in pieces("<think>\nFirst I think.\n</think>\n\nThen I say.", 3):
        part(piece)
    part.close()
    answer.close()
    if folds:
        assert screen.lines[0].startswith("thought for ")
        assert "First" not in screen.written
    else:
        assert screen.lines[0] == "First I think."
        assert "\x1b[2m" in screen.written
    assert screen.lines[1:] == ["", "Then I say."]


def test_an_answer_that_only_thinks_and_one_of_nothing(screen: Screen) -> None:
    answer = AnswerScreen()
    answer.close()
    assert screen.written == ""
    answer.thinking("Hm.")
    answer.close()
    assert screen.lines == ["Hm."]
    assert screen.screen.cursor.x == 0


# Parting thinking from the reply


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize(
    ("text", "until", "thinking", "reply"),
    [
        ("<think>\na <b\n</think>\n\nc < d", "", "a <b\n", "c < d"),
        ("so\n</think>\n\nc", "</think>", "so\n", "c"),
        ("no <thin air", "", "", "no <thin air"),
        ("[THINK]a[/THINK]b</think>", "", "a", "b</think>"),
        ("x<think>y</think>z<think>w", "", "yw", "xz"),
        ("", "", "", ""),
    ],
)
def test_text_is_parted_however_the_pieces_fall(size: int, text: str, until: str, thinking: str, reply: str) -> None:
    heard: dict[bool, str] = {True: "", False: ""}

    def on(thinks: bool, piece: str) -> None:
        heard[thinks] += piece

    part = Parting(lambda piece: on(True, piece), lambda piece: on(False, piece), until)
    for begin in range(0, len(text), size):
        part(text[begin : begin + size])
    part.close()
    assert (heard[True], heard[False]) == (thinking, reply)


def test_a_template_that_begins_to_think() -> None:
    assert open_mark("<|im_start|>assistant\n<think>\n") == "</think>"
    assert open_mark("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""


def test_drawing_takes_little_time(screen: Screen) -> None:
    text = "\n".join(f"{number}. a line of a long list with `code` and **bold** words" for number in range(100))
    start = time.process_time()
    console.markdown_lines(text, 59)
    console.finished(text)
    assert time.process_time() - start < 0.5
