"""What a process that is no more has left goes; what a living one writes, and what is a user's, stays."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from disk import disk_of
from faults.commands import Inputs, Outcome, leftovers, make_inputs, places, run_line

from griffin_offload import workspace as workspace_module
from griffin_offload.errors import GriffinError
from griffin_offload.files import write_text, write_whole
from griffin_offload.jsonl import Results
from griffin_offload.memory.measure import disk_bandwidth
from griffin_offload.memory.spill import Spill
from griffin_offload.workspace import LOCK, remove, sweep, workspace

pytestmark = pytest.mark.fault
NAME = ".griffin-0123abcd.tmp"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("leftovers"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with places(tmp_path):
        yield tmp_path


def left(folder: Path) -> Path:
    """What a killed process leaves in a folder."""
    (work := folder / NAME).mkdir(parents=True)
    (work / LOCK).touch()
    (work / "out").mkdir()
    (work / "out" / "model.safetensors").write_bytes(b"half")
    return work


EXPORT = ("export-pruned", "--model", "{model}", "--prompt", "a b")
COMMANDS = {
    "export, beside": (".", (*EXPORT, "--out", "<out>")),
    "export gguf, beside": (".", (*EXPORT, "--format", "gguf", "--out", "<o.gguf>")),
    "generate --output, beside": (
        ".",
        ("generate", "--model", "{model}", "--input", "{rows.jsonl}", "--output", "<o>"),
    ),
    "plot, beside": (
        ".",
        ("plot", "statistic", "--model", "{model}", "--prompt-file", "{p.txt}", "--out", "<o.svg>"),
    ),
    "any, in the cache": ("GRIFFIN_CACHE", ("models",)),
    "any, in a folder of the cache": ("GRIFFIN_CACHE/calibration", ("models",)),
    "any, among the models": ("GRIFFIN_CACHE/gguf", ("models",)),
    "any, among the sessions": ("GRIFFIN_STATE/sessions", ("sessions",)),
    "any, in the folder for temporary files": ("TMPDIR", ("models",)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_removes_what_a_killed_one_left(inputs: Inputs, place: Path, name: str) -> None:
    folder, words = COMMANDS[name]
    work = left(place / folder)
    assert line(inputs, place, *words).code == 0
    assert not work.exists()
    assert not leftovers(place)


def line(inputs: Inputs, place: Path, *words: str) -> Outcome:
    """A command: {name} is an input, <name> is in `place`."""
    return run_line(tuple(w.replace("{", f"{inputs.folder}/").replace("<", f"{place}/").strip("}>") for w in words))


HOLDER = """
import sys, time
from pathlib import Path
from griffin_offload.workspace import workspace
with workspace(Path(sys.argv[1])) as work:
    (work / "mine").touch()
    print(work.name, flush=True)
    sys.stdin.read()
"""


def test_a_living_process_keeps_its_own_and_a_killed_one_does_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    with process.stdin, process.stdout:
        name = process.stdout.readline().strip()
        sweep(tmp_path)
        assert (tmp_path / name / "mine").exists()
        process.kill()
        process.wait()
        assert (tmp_path / name / "mine").exists()
        sweep(tmp_path)
        assert not list(tmp_path.iterdir())


def test_another_of_this_process_is_kept(tmp_path: Path) -> None:
    with workspace(tmp_path) as one, workspace(tmp_path) as other:
        assert one.exists()
        assert other.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["a file", "a folder with files", "a link", "another name", "no lock is known"])
def test_what_is_a_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path, real = tmp_path / "in" / NAME, tmp_path / "real"
    path.parent.mkdir()
    if what == "a file":
        path.write_text("mine")
    elif what == "a folder with files":
        path.mkdir()
        (path / "thesis").write_text("mine")
    elif what == "a link":
        (real / LOCK).parent.mkdir()
        (real / LOCK).touch()
        path.symlink_to(real)
    elif what == "another name":
        path = left(path.parent).rename(path.with_name(".griffin-mine.tmp"))
    else:
        path = left(path.parent)
        monkeypatch.setattr(workspace_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "none")))
    before = sorted(tmp_path.rglob("*"))
    write_text(path.parent / "o", "text")
    (path.parent / "o").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_one_without_a_lock_goes(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["before it has a lock", "before the lock is taken"])
def test_one_that_is_swept_as_it_begins_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real, swept = getattr(os, "open"), []  # noqa: B009

    def opened(path: Path, flags: int, *mode: int) -> int:
        first = not swept and flags & os.O_CREAT
        if first and moment == "before it has a lock":
            swept.append(path)
            path.parent.rmdir()
        descriptor: int = real(path, flags, *mode)
        if first and moment == "before the lock is taken":
            swept.append(path)
            remove(path.parent)
        return descriptor

    monkeypatch.setattr(workspace_module.os, "open", opened)
    with workspace(tmp_path) as work:
        assert swept
        assert (work / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with suppress(ValueError), workspace(tmp_path) as work:
        (work / "link").symlink_to(tmp_path / "mine")
        (work / "file").symlink_to(tmp_path / "mine" / "file")
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "file").exists()


def test_a_process_without_open_files_removes_its_own(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with workspace(tmp_path) as work:
            for depth in ("a", "a/b", "a/b/c"):
                (work / depth).mkdir()
                (work / depth / "file").touch()
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError, RecursionError])
@pytest.mark.parametrize("when", ["in it", "as it is removed"])
def test_whatever_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException], when: str
) -> None:
    real, raised = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if when == "as it is removed" and not raised:
            raised.append(path)
            raise interrupt
        real(path, missing_ok)

    def run() -> None:
        with write_whole(tmp_path / "file") as temporary:
            temporary.write_text("half")
            monkeypatch.setattr(Path, "unlink", unlink)
            if when == "in it":
                raise interrupt

    with pytest.raises(interrupt):
        run()
    monkeypatch.undo()
    assert not list(tmp_path.glob(".griffin-*"))


# A full disk


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--model", "{model}", "--input", "{rows.jsonl}", "--output", "<o.jsonl>", "--prior", "off"),
        (*EXPORT, "--out", "<out>"),
        (*EXPORT, "--out", "<a/b/out>"),
        (*EXPORT, "--format", "gguf", "--out", "<o.gguf>"),
        ("export-pruned", "--model", "{model}", "--calibration", "{texts.jsonl}", "--prior-out", "<p>"),
        ("eval", "choice", "--model", "{model}", "--data", "{choice.jsonl}", "--out", "<o.jsonl>"),
        ("plot", "statistic", "--model", "{model}", "--prompt-file", "{p.txt}", "--out", "<o.svg>"),
        ("calibrate", "--model", "{model}", "--prompt-tokens", "8", "--continue-tokens", "4", "--windows", "1"),
        ("pull", "{model.gguf}"),
    ],
    ids=lambda words: f"{words[0]} {words[-2]} {words[-1].strip('<>')}".replace("/", " in "),
)
def test_a_full_disk_leaves_nothing(inputs: Inputs, place: Path, words: tuple[str, ...]) -> None:
    before = sorted(place.rglob("*"))
    with disk_of(0):
        result = line(inputs, place, *words)
    assert (result.code, result.traceback) == (1, None), result.stderr
    errors = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert str(place) in errors[0] or "model.gguf" in errors[0]
    made = set(place.rglob("*")) - set(before)
    assert not {path for path in made if path.is_file() and not path.name.endswith(".lock")}
    assert not leftovers(place)
    assert not (place / "a").exists()


def test_a_spill_that_finds_no_room_is_one_line(tmp_path: Path) -> None:
    spill = Spill(0, tmp_path)
    with disk_of(0), pytest.raises(GriffinError, match="cannot hold the waiting hidden states"):
        spill.put(0, torch.zeros(1, 4, 4))
    spill.close()
    assert not list(tmp_path.iterdir())


def test_a_measurement_of_the_disk_leaves_nothing(tmp_path: Path) -> None:
    with disk_of(0), pytest.raises(OSError, match="too large"):
        disk_bandwidth(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_state_does_not_stay_without_its_rows(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    with suppress(GriffinError), Results(tmp_path / "o", {}, source=source):
        raise GriffinError("before the first row")
    assert list(tmp_path.iterdir()) == [source]


def test_temporary_files_of_the_library_are_ours(tmp_path: Path) -> None:
    """Nothing of Griffin's makes them otherwise: they would stay after a kill."""
    root = Path(__file__).parents[2]
    sources = [*(root / "griffin_offload").rglob("*.py"), *(root / "cli").rglob("*.py")]
    makers = ("mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryDirectory")
    assert not [path.name for path in sources if any(f"tempfile.{name}" in path.read_text() for name in makers)]
