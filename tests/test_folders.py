"""The import rule, read from the source: a file imports from its own folder, or from one to the left of it."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, CLI = ROOT / "griffin_offload", ROOT / "cli"
# Each group stands on those before it. Files at the top stand by their own names; `ground` are those named first.
RULE = """foreign < errors version marks < units workspace < files options < inputs < paths jsonl small_json < pruning
    memory native < quant checkpoint < model < sources planning < offload report text_stream prompt_encoder
    < row_ends open_model streamer < opening model_prior run < export generation < refresh prefix < engine < chat
    evaluation serving page many < session < cli"""
RANK = {name: rank for rank, group in enumerate(RULE.split("<")) for name in group.split()}
GROUND = set(RULE.partition("< pruning")[0].replace("<", " ").split())


def files() -> list[tuple[tuple[str, ...], Path]]:
    """Every module by its name within the package."""
    ours = [(path.relative_to(PACKAGE).with_suffix("").parts, path) for path in PACKAGE.rglob("*.py")]
    commands = [(("cli", *path.relative_to(CLI).with_suffix("").parts), path) for path in CLI.rglob("*.py")]
    return sorted(ours + commands)


def imports(name: tuple[str, ...], path: Path) -> set[tuple[str, ...]]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*name[: len(name) - node.level], *(node.module.split(".") if node.module else ()))
            found |= {base} if node.module else {(*base, alias.name) for alias in node.names}
    return found


def test_a_file_imports_from_its_own_folder_or_from_one_to_the_left() -> None:
    wrong = [
        f"{'.'.join(name)} imports {'.'.join(other)}"
        for name, path in files()
        if name != ("__init__",)
        for other in imports(name, path)
        if other[0] != name[0] and RANK[other[0]] >= RANK[name[0]]
    ]
    assert not wrong


def test_no_file_imports_in_a_circle() -> None:
    known = {name: imports(name, path) for name, path in files() if name != ("__init__",)}
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> None:
        assert name not in above, " -> ".join(".".join(each) for each in (*above, name))
        for other in known.get(name, ()):
            if name not in done:
                visit(other, (*above, name))
        done.add(name)

    for name in known:
        visit(name, ())


def test_every_folder_is_installed() -> None:
    """An editable installation finds those that pyproject.toml forgets."""
    told = (ROOT / "pyproject.toml").read_text()
    for init in PACKAGE.rglob("__init__.py"):
        name = ".".join(("griffin_offload", *init.parent.relative_to(PACKAGE).parts))
        assert f'"{name}",' in told, name


def test_every_folder_lists_its_files() -> None:
    for folder in {path.parent for _, path in files()} - {PACKAGE, CLI}:
        told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        missing = [p.name for p in folder.glob("*.py") if p.stem != "__init__" and f"{p.name} " not in told]
        assert not missing, f"{folder.name}/__init__.py does not tell of {missing}"


def test_click_rich_and_prompt_toolkit_stay_in_the_commands_and_the_last_two_in_a_file_each() -> None:
    for name, path in files():
        outside = external(path)
        assert name[0] == "cli" or not outside & {"click", "rich"}, name
        assert name == ("cli", "_console") or not outside & {"rich", "markdown_it"}, name
        assert name == ("cli", "_terminal") or "prompt_toolkit" not in outside, name


def test_no_pickle() -> None:
    for name, path in files():
        assert not external(path) & {"pickle", "dill", "joblib"}, name
        text = path.read_text()
        assert "torch.load" not in text and "trust_remote_code=True" not in text, name  # noqa: PT018


def external(path: Path) -> set[str]:
    """Top-level names of the other packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_ground_imports_no_torch() -> None:
    for name, path in files():
        assert name[0] not in GROUND or not external(path) & {"torch", "transformers", "numpy"}, name


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['griffin', '--help']\n"
        "from griffin_offload.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'rich', 'numpy', 'huggingface_hub', 'prompt_toolkit'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    best = float("inf")
    for _ in range(5):  # processor time, the best of a few: other tests may hold the processor
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        best = min(best, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
        assert result.returncode == 0, result.stderr
    assert "export-pruned" in result.stdout
    assert best < 0.3
