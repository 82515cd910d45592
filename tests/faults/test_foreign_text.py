"""What others wrote reaches no terminal as a command: every text, on every way out."""

import ast
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from griffin_offload.cli import _console as console
from griffin_offload.cli import _print, models
from griffin_offload.cli._answer_screen import AnswerScreen
from griffin_offload.cli.main import fail, griffin
from safetensors.torch import save_file
from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import one_line
from griffin_offload.foreign import ERROR, printable, sentence, shown
from griffin_offload.paths import cache_folder

pytestmark = pytest.mark.fault

CLI = Path(__file__).parents[2] / "cli"
# What a terminal or a reader would be deceived by.
HOSTILE = {
    "clear_the_screen": "\x1b[2J",
    "colour": "\x1b[31m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "device_control": "\x1bP1$r\x1b\\",
    "csi_of_8_bits": "\x9b2J",
    "osc_of_8_bits": "\x9d0;owned\x9c",
    "backspaces": "safe\b\b\b\bevil",
    "delete": "a\x7f",
    "null": "a\x00b",
    "bell": "\x07",
    "shift_out": "\x0e",
    "override": "\u202egnp.exe",
    "isolate": "\u2066\u2069",
    "line_separator": "a\u2028b",
    "paragraph_separator": "a\u2029b",
    "next_line": "a\x85b",
    "vertical_tab": "a\vb\fc",
    "half_a_character": "\ud800",
    "tag_letters": "\U000e0041\U000e0042",
    "annotation": "\ufff9a\ufffab\ufffb",
}
NAMES_ONLY = {"no_width": "a\u200bb", "joiner": "a\u200db", "filler": "a\u3164b", "line_feed": "a\nb", "tab": "a\tb"}
NEEDED = {  # that an answer shows as it is
    "persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "family": "👨\u200d👩\u200d👧",
    "flag": "❤\ufe0f",
    "hebrew_mark": "א\u200f!",
    "soft_hyphen": "Donau\u00addampf",
    "chinese": "世界\u3000",
    "private_use": "\ue0b0",
    "combining": "e\u0301",
    "code": "def f():\n\treturn '\\x1b'",
}


def is_clean(text: str, *, ours: str = "") -> bool:
    """Whether a terminal would obey nothing of a text, but for `ours`, a pattern of our own sequences."""
    rest = re.sub(ours, "", text) if ours else text
    return not [
        c
        for c in rest
        if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
        or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        or 0xE0000 <= ord(c) <= 0xE007F
    ]


class Terminal(io.StringIO):
    """A terminal, which is stdout and stderr in a `with` block."""

    def isatty(self) -> bool:
        return True

    def __enter__(self) -> "Terminal":
        self.before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self.before


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "cache"))  # what is calibrated here is of no other test


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


SGR = r"\x1b\[[\d;]*m"  # rich's own colours
DRAWING = r"\x1b\[(\d*;?\d*[mAKJ]|\?25[lh])|\r"  # and how a line is drawn again


# The functions


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_text_is_not_obeyed(kind: str) -> None:
    text = printable(f"before {HOSTILE[kind]} after")
    assert is_clean(text)
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "".join(map(printable, f"before {HOSTILE[kind]} after")) == text, "in pieces as well"


@pytest.mark.parametrize("kind", NEEDED)
def test_a_text_that_a_language_needs_stays(kind: str) -> None:
    assert printable(NEEDED[kind]) == NEEDED[kind]


@pytest.mark.parametrize("kind", [*HOSTILE, *NAMES_ONLY])
def test_a_name_is_one_line_and_tells_what_it_holds(kind: str) -> None:
    name = (HOSTILE | NAMES_ONLY)[kind]
    told = shown(name)
    assert told.isprintable()
    assert told != name
    assert shown(name + "x") != shown("x")
    assert sentence(f"no {name}").isprintable()
    assert one_line(ValueError(f"no {name}")).isprintable()


def test_a_carriage_return_overwrites_nothing() -> None:
    assert printable("100 dollars\rfree") == "100 dollarsfree"
    assert printable("a\r\nb") == "a\nb"
    assert shown("a\rb") == r"a\rb"


@pytest.mark.parametrize("length", [1000, 10**6])
def test_a_long_text_is_cut_where_it_is_named(length: int) -> None:
    told = one_line("begin " + "\x1b" * length + " end")
    assert told.startswith("begin ")
    assert told.endswith(" end")
    assert len(told) < 300


# The ways out


WAYS: dict[str, Callable[[str], object]] = {
    "note": console.note,
    "error": console.error,
    "cell": lambda text: console.table("t", ("a", "b"), [(text, 1)]),
    "title": lambda text: console.table(text, ("a" * 70,), [("b",)]),
    "pair": lambda text: console.pairs([(text, text)]),
    "answer": console.stream,
    "line": _print.echo,
    "line_on_stderr": lambda text: _print.echo(text, err=True),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_a_terminal_passes_a_command(way: str, kind: str, terminal: Terminal) -> None:
    with terminal:
        WAYS[way](f"before {HOSTILE[kind]} after [/] [red] :smile:")
    written = terminal.getvalue()
    assert is_clean(written, ours=SGR)
    assert "before" in written
    assert {"[/]", "[red]", ":smile:"} <= set(re.sub(SGR, "", written).split()), "no markup of rich's is read"
    assert not re.findall(r"\x1b\[31m", written)


def test_a_fault_ends_with_a_clean_line(terminal: Terminal) -> None:
    with terminal, pytest.raises(SystemExit):
        fail("".join(HOSTILE.values()) + "x" * 10_000, 1)
    assert is_clean(terminal.getvalue())
    assert len(terminal.getvalue()) < ERROR + 100


def test_a_bar_tells_a_name_as_it_is(terminal: Terminal) -> None:
    with terminal, console.progress_bytes("Fetching") as update:
        for text in HOSTILE.values():
            update(f"[/red]{text}.gguf", 1, 2)
    assert is_clean(terminal.getvalue(), ours=DRAWING)


def test_an_answer_to_a_file_is_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.stream("\x1b[31mred\r\n")
    assert sys.stdout.getvalue() == "\x1b[31mred\r\n"  # type: ignore[attr-defined]


MARKDOWN = {
    **HOSTILE,
    "entity_escape": "&#27;[2J &#x1b;]0;owned&#7;",
    "entity_csi": "&#x9b;2J",
    "entity_override": "&#x202e;gnp.exe **&#8238;x**",
    "entity_in_a_link": "[a&#x202e;](http://x&#x1b;.y '&#x202e;')",
    "in_code": "```\x1b]0;owned\x07\n\x1b[2J\n```",
    "in_code_s_language": "```py&#x202e;\nx\n```",
    "in_a_table": "| a\x1b[2J |\n|---|\n| &#x202e; |",
    "in_a_heading": "# \x1b[2J&#x202e;",
    "image": "![&#x202e;](\x1b[2J)",
    "html": "<script>\x1b[2J</script>",
}


@pytest.mark.parametrize("kind", MARKDOWN)
@pytest.mark.parametrize("markdown", [True, False], ids=["rendered", "plain"])
def test_an_answer_that_comes_in_pieces(kind: str, markdown: bool, terminal: Terminal) -> None:
    text = f"before {MARKDOWN[kind]} after" if kind in HOSTILE else MARKDOWN[kind]
    for size in (1, 3, 1000):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        with terminal:
            answer = AnswerScreen(markdown=markdown)
            answer.EVERY = 0.0
            for show in (answer.thinking, answer.reply):
                for piece in pieces:
                    show(piece)
            answer.close()
    assert is_clean(terminal.getvalue(), ours=DRAWING)


def test_what_is_printed_goes_through_two_files() -> None:
    """No other file of the commands writes to a stream by itself."""
    allowed = {"_print.py", "_console.py"}
    for path in sorted(CLI.glob("*.py")):
        if path.name in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "click.echo", "click.secho", "click.echo_via_pager", "traceback.print_exc")
            assert not re.fullmatch(r"sys\.(stdout|stderr)\.(buffer\.)?write(lines)?", called), path.name


# The commands


NAME = "\x1b]0;owned\x07\u202e"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose folder, template and config are not to be trusted."""
    return tiny_checkpoint(tmp_path_factory.mktemp("foreign") / f"m{NAME}", "llama", chat=True)


def at_a_terminal(terminal: Terminal, *arguments: object, typed: str = "") -> str:
    """What a command writes to a terminal. Its colours are taken out."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
    try:
        with terminal, suppress(SystemExit):
            griffin.main([str(argument) for argument in arguments])
    finally:
        sys.stdin = sys.__stdin__
    return re.sub(DRAWING, "", terminal.getvalue())


COMMANDS = {
    "generate": ("generate", "--prompt", "x", "--max-new-tokens", "2", "--sparsity", ".5"),
    "generate_of_a_file": ("generate", "--prompt-file", f"no{NAME}"),
    "mem_report": ("mem-report", "--prompt-tokens", "9", "--max-new-tokens", "2"),
    "mem_report_of_an_option": ("mem-report", "--prior", f"no{NAME}"),
    "eval": ("eval", "perplexity", "--data", f"no{NAME}"),
    "export": ("export-pruned", "--prompt", "x", "--out", f"/nowhere{NAME}/x"),
    "calibrate": ("calibrate", "--prompt-tokens", "16", "--continue-tokens", "4", "--windows", "1"),
    "chat": ("chat", "--greedy", "--max-new-tokens", "2"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_with_a_hostile_model(command: str, model: Path, terminal: Terminal) -> None:
    typed = f"hi\n/save no{NAME}/x\n/{NAME}\n/set {NAME}\n/system {NAME}\n/mem\n" if command == "chat" else ""
    written = at_a_terminal(terminal, *COMMANDS[command], "--model", model, typed=typed)
    assert written
    assert is_clean(written)


def test_names_that_are_no_commands_options_or_models(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GRIFFIN_{NAME}", "x")
    for arguments in ([NAME], [f"--{NAME}"], ["models", NAME], ["pull", NAME], ["chat", "--resume", NAME], ["config"]):
        at_a_terminal(terminal, *arguments)
    assert is_clean(re.sub(DRAWING, "", terminal.getvalue()))


def test_a_template_that_refuses_with_a_command(tmp_path: Path, terminal: Terminal) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", chat=True)
    (folder / "chat_template.jinja").write_text(f"{{{{ raise_exception('{NAME}' + 'x' * 100000) }}}}")
    written = at_a_terminal(terminal, "chat", "--model", folder, typed="hi\n")
    written += at_a_terminal(terminal, "generate", "--model", folder, "--prompt", "hi")
    assert "refused the conversation" in written
    assert is_clean(written)
    assert len(written) < 5000


def test_a_report_of_another_is_shown_clean(model: Path, terminal: Terminal) -> None:
    at_a_terminal(terminal, "generate", "--model", model, "--prompt", "x", "--max-new-tokens", "2")
    path = cache_folder() / "last.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": NAME, "model": NAME, "device": "[/]"}))
    terminal.seek(terminal.truncate(0))
    written = at_a_terminal(terminal, "mem-report", "--last")
    assert "[/]" in written
    assert is_clean(written)


def test_a_prior_of_another_is_told_clean(tmp_path: Path, terminal: Terminal) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", chat=True)
    engine = Engine(folder)
    facts = {"layers": 4, "score": NAME, "samples": 1, "model": NAME, "key": NAME}
    shapes = [[block.statistic_shape for block in layer.blocks] for layer in engine.skeleton.layers]
    facts["layers"] = len(shapes)
    scores = {f"{i}.{j}": torch.ones(tuple(shape)) for i, blocks in enumerate(shapes) for j, shape in enumerate(blocks)}
    save_file(scores, tmp_path / "prior", {"format": "griffin-prior", "facts": json.dumps(facts)})
    asked = ("generate", "--model", folder, "--prompt", "x", "--sparsity", ".5", "--max-new-tokens", "2")
    written = at_a_terminal(terminal, *asked, "--prior", tmp_path / "prior")
    assert "owned" in written
    assert is_clean(written)


def test_sessions_and_models_of_others_are_listed_clean(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict.fromkeys(("hub_id", "parameters", "bytes_bf16", "licence", "gated", "chat"))
    monkeypatch.setattr(models, "entries", lambda: [{**row, "name": NAME, "path": NAME, "bytes_on_disk": 1}])
    assert "owned" in at_a_terminal(terminal, "models")
    from griffin_offload.cli import sessions

    found = {"name": NAME, "saved": 1.0, "bytes": 1, "model": NAME, "messages": 2, "tokens": 3}
    monkeypatch.setattr(sessions, "entries", lambda: [found])
    assert is_clean(at_a_terminal(terminal, "sessions"))


def test_settings_of_others_are_shown_clean(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "griffin.toml"
    monkeypatch.setenv("GRIFFIN_CONFIG", str(path))
    for content in ('system = "\\u001b[2J\\u202e"', '"\\u001b[2J" = 1', '[chat]\nrest = "\\u001b[2J"', "\x1b[2J"):
        path.write_text(content)
        for command in (["config"], ["chat", "--model", NAME]):
            assert is_clean(at_a_terminal(terminal, *command))


@pytest.mark.parametrize("command", ["models", "config", "sessions", "mem-report"])
def test_json_holds_no_command(command: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GRIFFIN_X{NAME}", "x")
    asked = ["--model", str(model), "--prompt-tokens", "9", "--max-new-tokens", "2"]
    result = CliRunner().invoke(griffin, [command, "--json", *(asked if command == "mem-report" else [])])
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    assert result.stdout.isascii()


def test_completion_gives_a_shell_nothing_to_run() -> None:
    for line in ("griffin ", "griffin generate --model ", "griffin chat --resume "):
        result = CliRunner().invoke(
            griffin,
            prog_name="griffin",
            env={"_GRIFFIN_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": "9"},
        )
        for item in result.stdout.splitlines():
            assert re.fullmatch(r"((plain|file|dir),[\w./-]*)?", item), item


# A page


class Reader(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_page_runs_and_loads_nothing(model: Path, tmp_path: Path) -> None:
    prompt = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"
    asked = ("--model", str(model), "--prompt", prompt, "--max-new-tokens", "2", "--report", str(tmp_path / "p.html"))
    result = CliRunner().invoke(griffin, ["generate", *asked])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "p.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert is_clean(page)
    assert not reader.tags & {"script", "img", "iframe", "object", "link", "a"}
    assert not {name for name in reader.attributes if name.startswith("on") or name in ("src", "href")}
