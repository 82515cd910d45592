"""Files that are written whole or not at all; what went wrong, in words."""

import json
import stat
from pathlib import Path

import pytest

from griffin_offload.errors import BudgetError, FetchError
from griffin_offload.files import free_disk, make_once, reason, write_text, write_whole
from griffin_offload.paths import require_disk


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two", sync=True)
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def interrupted() -> None:
        with write_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_only_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "file.txt", "text", make_folder=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    def build(work: Path) -> Path:
        (work / "scratch").write_text("gone")
        (work / "out").mkdir()
        (work / "out" / "file").write_text("made")
        return work / "out"

    def fail(work: Path) -> Path:
        raise AssertionError("it is there already")

    folder = tmp_path / "cache" / "model"
    assert make_once(folder, build, Path.is_dir) == folder
    assert make_once(folder, fail, Path.is_dir) == folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert {path.name for path in folder.parent.iterdir()} <= {"model", ".model.lock"}


@pytest.mark.parametrize(("number", "kind"), [(28, BudgetError), (13, FetchError)])
def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    def build(work: Path) -> Path:
        raise OSError(number, "no")

    with pytest.raises(kind):
        make_once(tmp_path / "model", build, Path.is_dir)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".model.partial").exists()


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") > 0
    require_disk(tmp_path / "a", 1, "it")
    with pytest.raises(BudgetError, match="it needs"):
        require_disk(tmp_path / "a", 2**70, "it")


def test_reasons_are_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "none").read_text()
    assert reason(missing.value) == "no such file or directory"
    with pytest.raises(json.JSONDecodeError) as broken:
        json.loads("{")
    assert reason(broken.value).startswith("it is not JSON (")
    with pytest.raises(UnicodeDecodeError) as binary:
        b"\xff".decode()
    assert reason(binary.value) == "it is not UTF-8 text"
    assert reason(ValueError("embedded null byte")) == "embedded null byte"


def test_a_written_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "file", "")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
