"""The page of a run: whole, nothing from elsewhere, and a browser shows it."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_line import failed
from griffin_offload.cli.main import griffin
from tiny import tiny_checkpoint

from griffin_offload.memory.timeline import MOST, Timeline
from griffin_offload.page.charts import Scale

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "Why is <b>the sky</b> blue & not 'green'? <script>alert(1)</script>"


class Reader(HTMLParser):
    """Counts elements and finds those that are not closed; keeps attributes and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in {"meta"}:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that drops neurons."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny_checkpoint(folder / "llama", "llama", chat=True)
    path = folder / "run.html"
    options = ["--sparsity", "0.5", "--rest", "drop", "--prior", "off", "--greedy", "--max-new-tokens", "9"]
    arguments = ["generate", "--model", str(model), "--prompt", PROMPT, "--report", str(path), *options]
    result = CliRunner().invoke(griffin, arguments)
    assert result.exit_code == 0, result.output
    assert f"the run as a page: {path}" in result.stderr
    assert "page" not in result.stdout
    return path


def test_the_page_is_whole_and_has_nothing_from_elsewhere(page: Path) -> None:
    read = Reader(page.read_text("utf-8"))
    assert not read.elements["script"]
    assert not {name for _, name, _ in read.attributes} & {"src", "href", "srcset", "onload", "onclick"}
    assert "http" not in re.sub(r"http-equiv", "", page.read_text("utf-8"))
    assert "url(" not in page.read_text("utf-8")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes


def test_the_page_shows_the_run(page: Path) -> None:
    read = Reader(page.read_text("utf-8"))
    assert read.elements["svg"] == 3
    assert PROMPT in read.text
    for words in ("Memory over time", "Plan against measurement", "Layers", "Settings", "sparsity", "0.5", "fidelity"):
        assert words in read.text
    assert re.search(r"layer 2: 48 of 96 neurons, .* resident", read.text)
    assert len(re.findall(r"layer \d: [\d.]+ s of computing", read.text)) == 3
    assert "prompt pass" in read.text


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_shows_the_page(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"

    def browse(*options: str) -> subprocess.CompletedProcess[str]:
        quiet = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path}",
        ]
        command = [str(BROWSER), *quiet, *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    result = browse(f"--screenshot={picture}", "--window-size=1000,1500")
    assert "CONSOLE" not in result.stderr, result.stderr
    assert picture.stat().st_size > 20_000  # a blank page of this size has 5000 bytes
    seen, written = Reader(browse("--dump-dom").stdout).elements, Reader(page.read_text("utf-8")).elements
    for element in ("svg", "rect", "polyline", "tr", "h2"):
        assert seen[element] == written[element], element


def test_a_page_replaces_only_a_page(page: Path, tmp_path: Path) -> None:
    def run(path: Path) -> Result:
        arguments = ["generate", "--model", str(page.parent / "llama"), "--prompt", "x", "--report", str(path)]
        return CliRunner().invoke(griffin, [*arguments, "--max-new-tokens", "2"])

    mine = tmp_path / "notes.html"
    mine.write_text("<p>my notes</p>")
    failed(run(mine), 1, "notes.html", "another name")
    assert mine.read_text() == "<p>my notes</p>"
    failed(run(tmp_path / "no" / "x.html"), 1, "no folder")
    copy = tmp_path / "run.html"
    copy.write_text(page.read_text("utf-8"), "utf-8")
    assert run(copy).exit_code == 0
    assert "2 tokens" in copy.read_text("utf-8")


def test_many_samples_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with Timeline("cpu") as timeline:
        pass
    assert len(timeline.samples) >= 1
    assert all(sample.process > 10**7 for sample in timeline.samples)
    monkeypatch.setattr("griffin_offload.memory.timeline.EVERY", 0.0)
    with Timeline("cpu") as timeline:
        while timeline._every == 0.0 and len(timeline.samples) < MOST:
            pass
    times = [sample.seconds for sample in timeline.samples]
    assert times == sorted(times)
    assert len(times) <= MOST + 2


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.65, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (6.3, [0, 1, 2, 3, 4, 5, 6]),
        (2.5, [0, 0.5, 1, 1.5, 2, 2.5]),
    ],
)
def test_axes_have_round_values(most: float, expected: list[float]) -> None:
    assert Scale(most, 0, 100).ticks() == pytest.approx(expected)
