"""What README.md and CONTRIBUTING.md say: their Python runs, their commands parse, their files are there."""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import click
import pytest
from griffin_offload.cli.main import griffin

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.exists()
]
COMMAND = re.compile(r"`(griffin [^`]+)`|^ {4}\$? ?(griffin (?:.*\\\n)*.*)$", re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `griffin ...` in a page, in backticks or indented; those that end in ... are no whole ones."""
    found = []
    for match in COMMAND.finditer(page.read_text()):
        line = (match[1] or match[2]).replace("\\\n", " ").replace("\n", " ")
        if "..." not in line and "…" not in line and "[OPTIONS]" not in line:
            found.append(shlex.split(line, comments=True)[1:])
    return found


def parse(arguments: list[str]) -> None:
    """As the command would, without running it. Capital words are the reader's: a folder, a number, a command."""
    command: click.Command = griffin
    context = click.Context(griffin, info_name="griffin")
    rest = [argument for argument in arguments if argument not in ("--debug",)]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0].isupper():
            return  # `griffin COMMAND --help`
        found = command.get_command(context, rest[0])
        assert found is not None, f"griffin has no command {rest[0]!r}"
        command, rest = found, rest[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for argument in rest:
        name = argument.partition("=")[0]
        assert not name.startswith("-") or name in known | {"--help"}, f"{command.name} has no option {name}"
    if not {"--help", "--version"} & set(rest) and isinstance(command, click.Command):
        values = ["1" if re.fullmatch("[A-Z]", argument) else argument for argument in rest]
        command.make_parser(context).parse_args(values)  # each option that takes a value has one


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_command_line_parses(page: Path) -> None:
    for arguments in commands(page):
        try:
            parse(arguments)
        except (AssertionError, click.UsageError) as error:
            pytest.fail(f"{page.name}: griffin {shlex.join(arguments)}: {error}")


def test_the_readme_shows_the_main_commands() -> None:
    shown = {arguments[0] for arguments in commands(ROOT / "README.md") if arguments}
    assert {"chat", "generate", "export-pruned", "mem-report"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # on the web
        path, _, title = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if title and linked.suffix == ".md":
            assert title in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_file_and_folder_that_is_named_is_there(page: Path) -> None:
    """In backticks, or at the head of a line of a map; not those that a reader would make, marked (new)."""
    if not page.exists():
        pytest.skip(f"{page.name} is not there yet")
    text = page.read_text()
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|txt|toml))`(?! \(new\))", text)
    named += re.findall(r"^ {4}((?:[\w.-]+/)+(?:\w+\.py)?) ", text, re.MULTILINE)
    own = {"pruned/", "question.txt", "p.txt", "out/"}  # in examples
    for name in set(named) - own:
        assert (ROOT / name).exists() or (ROOT / "griffin_offload" / name).exists(), f"{page.name} names {name}"


def test_the_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name} says make {target}"


def test_every_table_of_numbers_has_its_command() -> None:
    """A section of the README that shows a table of measured numbers also shows a command of griffin."""
    for section in re.split(r"^#+ ", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        cells = re.findall(r"\| *\d+(?:\.\d+)? *(?:GiB|MiB|s|tokens/s)?(?:, \d+\.\d+)? *(?=\|)", section)
        assert not cells or "griffin " in section, section.partition("\n")[0]


PYTHON = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_python() -> None:
    assert PYTHON


@pytest.mark.real
@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_the_python_of_the_readme_runs(block: str, smol: Path) -> None:
    with redirect_stdout(StringIO()) as out:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert out.getvalue().strip()


def test_the_page_of_promises_names_every_test_of_faults() -> None:
    told = (ROOT / "docs" / "reliability.md").read_text()
    for path in (ROOT / "tests" / "faults").glob("test_*.py"):
        assert f"| `{path.name}` |" in told, path.name
