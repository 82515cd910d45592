"""Rows that are read with checks; results that survive a stop. The stops are real: a kill, a full disk, a lock."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk import disk_of

from griffin_offload.errors import GriffinError
from griffin_offload.jsonl import Results, Row, read_rows

SETTINGS = {"model": "m", "sparsity": [0.5, 0.25], "system": None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", b'{"prompt": "a"}\n')


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def state_of(path: Path) -> Path:
    return path.with_name(path.name + ".state")


# Reading


def test_rows_keep_their_order_and_have_ids(tmp_path: Path) -> None:
    content = '\ufeff{"p": 1}\r\n\n{"id": "x", "p": "a\u2028b"}\n   \n{"id": 7, "p": 3}\n{"p": 4}'
    rows = read_rows(write(tmp_path / "in.jsonl", content.encode()))
    assert [row["id"] for row in rows] == [1, "x", 7, 6]  # of the file's lines, blank ones counted
    assert [row["p"] for row in rows] == [1, "a\u2028b", 3, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"p": 1}\n{"p": \n', ("line 2", "not JSON", "column")),
        (b'{"p": 1}\n\n[1, 2]\n', ("line 3", "not a JSON object")),
        (b'{"p": "\xff"}\n', ("line 1", "not UTF-8", "byte 7")),
        (b'{"p": "\\ud800"}\n', ("line 1", "half a character")),
        (b"[" * 100_000 + b"\n", ("line 1", "not JSON")),
        (b'{"p": ' + b"1" * 5000 + b"}\n", ("line 1", "not JSON")),
        (b'{"id": "a"}\n{"id": "a"}\n', ("line 2", "'a'", "line 1's")),
        (b'{"id": 2}\n{"p": 1}\n', ("line 2", "the id 2 is line 1's")),
        (b'{"id": null}\n', ("line 1", '"id"')),
        (b'{"id": true}\n', ("line 1", '"id"')),
        (b"\n \n", ("no rows",)),
        (b"", ("no rows",)),
    ],
)
def test_a_bad_file_is_refused_by_name_and_line(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    with pytest.raises(GriffinError) as error:
        read_rows(write(tmp_path / "in.jsonl", content))
    assert "\n" not in str(error.value)
    for word in (str(tmp_path / "in.jsonl"), *words):
        assert word in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match=r"none\.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(GriffinError, match="directory"):
        read_rows(tmp_path)


def test_a_fault_of_a_row_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", b'{"p": 1}\n{"q": 1}\n')
    with pytest.raises(GriffinError, match=r"in\.jsonl, line 2: no p"):
        read_rows(path, lambda row: None if "p" in row else "no p")


# Results


def test_results_are_plain_rows_and_nothing_else(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = [{"id": 1, "text": "naïve\n\u2028 ключ 😀"}, {"id": "b", "text": ""}]
    with Results(out, SETTINGS, source=source) as results:
        results.add(rows[0])
        assert lines(out) == rows[:1]  # there at once, not when the file is closed
        assert state_of(out).exists()
        results.add(rows[1])
    assert lines(out) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def stopped(out: Path, source: Path, rows: int = 2) -> None:
    """A run that ended early, as Ctrl-C ends one."""

    def run() -> None:
        with Results(out, SETTINGS, source=source) as results:
            for number in range(rows):
                results.add({"id": number, "text": "x" * 20})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.parametrize("tail", [b"", b'{"id": 2, "te', b'{"id": 2, "text": "whole, but for its newline"}', b"\0\0\0"])
def test_a_stopped_run_goes_on_without_what_was_half_written(tmp_path: Path, source: Path, tail: bytes) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    with out.open("ab") as file:
        file.write(tail)
    with Results(out, SETTINGS, source=source) as results:
        assert [row["id"] for row in results.rows] == [0, 1]
        assert results.has({"id": 1})
        assert not results.has({"id": "1"})
        assert not results.has({"id": 2})
        results.add({"id": 2})
        assert results.has({"id": 2})
    assert [row["id"] for row in lines(out)] == [0, 1, 2]


def test_a_run_stopped_in_its_first_row_goes_on(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source, rows=0)
    write(out, b'{"id": 0')
    with Results(out, SETTINGS, source=source) as results:
        assert results.rows == []
        results.add({"id": 0})
    assert lines(out) == [{"id": 0}]


def test_rows_are_told_apart_by_all_keys(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out, SETTINGS, source=source, keys=("id", "sparsity")) as results:
        results.add({"id": 1, "sparsity": 0.5})
        assert results.has({"id": 1, "sparsity": 0.5, "text": "another"})
        assert not results.has({"id": 1, "sparsity": 0.0})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "n"}, ('model "m"', '"n"')),
        ({"sparsity": [0.5, 0.0]}, ("sparsity [0.5, 0.25]", "[0.5, 0.0]")),
        ({"system": "Be brief."}, ("system null", '"Be brief."')),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, source: Path, other: dict[str, object], words: tuple[str, ...]
) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    before = out.read_bytes()
    with pytest.raises(GriffinError, match="--force") as error:
        Results(out, SETTINGS | other, source=source)
    for word in (str(out), *words):
        assert word in str(error.value)
    assert out.read_bytes() == before


def test_another_input_is_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    write(source, b'{"prompt": "b"}\n')
    with pytest.raises(GriffinError, match='begun with input "'):
        Results(out, SETTINGS, source=source)


def test_force_starts_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    with Results(out, SETTINGS | {"model": "n"}, source=source, force=True) as results:
        assert results.rows == []
        results.add({"id": 0})
    assert lines(out) == [{"id": 0}]


def test_a_file_that_no_stopped_run_left_is_refused(tmp_path: Path, source: Path) -> None:
    out = write(tmp_path / "out.jsonl", b"dear diary")
    with pytest.raises(GriffinError, match=r"out\.jsonl exists.*--force"):
        Results(out, SETTINGS, source=source)
    assert out.read_bytes() == b"dear diary"


def test_a_finished_run_is_not_gone_on_with(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out, SETTINGS, source=source) as results:
        results.add({"id": 0})
    with pytest.raises(GriffinError, match="exists"):
        Results(out, SETTINGS, source=source)


def test_a_state_without_rows_is_of_no_run(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    out.unlink()
    with Results(out, SETTINGS | {"model": "n"}, source=source) as results:
        results.add({"id": 0})
    assert lines(out) == [{"id": 0}]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_damaged_state_is_refused(tmp_path: Path, source: Path, content: bytes) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    write(state_of(out), content)
    with pytest.raises(GriffinError, match="--force"):
        Results(out, SETTINGS, source=source)
    assert len(lines(out)) == 2


@pytest.mark.parametrize(("line", "word"), [(b"{]\n", "not JSON"), (b'{"text": "x"}\n', "'id'")])
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, source: Path, line: bytes, word: str) -> None:
    out = tmp_path / "out.jsonl"
    stopped(out, source)
    with out.open("ab") as file:
        file.write(line)
    with pytest.raises(GriffinError, match=rf"out\.jsonl, line 3: .*{word}"):
        Results(out, SETTINGS, source=source)


def test_the_input_a_folder_and_a_device_are_no_output(tmp_path: Path, source: Path) -> None:
    before = source.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for name, word in ((source, "input"), (link, "input"), (tmp_path, "plain file"), (Path("/dev/null"), "plain file")):
        with pytest.raises(GriffinError, match=word):
            Results(name, SETTINGS, source=source, force=True)
    assert source.read_bytes() == before


def test_a_full_disk_stops_the_run_and_it_goes_on(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = [{"id": number, "text": "x" * 200} for number in range(4)]

    def run() -> None:
        with Results(out, SETTINGS, source=source) as results:
            for row in rows:
                if not results.has(row):
                    results.add(row)

    with disk_of(500), pytest.raises(GriffinError, match=r"cannot write to .*out\.jsonl"):
        run()
    assert out.stat().st_size == 500  # two rows and a piece of the third
    run()
    assert lines(out) == rows


WRITER = """
import sys
from pathlib import Path
from griffin_offload.jsonl import Results
with Results(Path(sys.argv[1]), {"model": "m"}, source=Path(sys.argv[2])) as results:
    for number in range(10**9):
        if not results.has({"id": number}):
            results.add({"id": number, "text": "x" * 5000})
"""


def test_a_run_that_is_killed_keeps_its_rows_and_one_at_a_time_writes(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        before = newlines(out)
        process = subprocess.Popen([sys.executable, "-c", WRITER, out, source])
        try:
            wait_for_newlines(out, before + 20)
            with pytest.raises(GriffinError, match="another run"):
                Results(out, {"model": "m"}, source=source, force=True)
        finally:
            process.kill()
            process.wait()
    whole = lines(out)
    assert len(whole) >= 40
    assert [row["id"] for row in whole] == list(range(len(whole)))
    with Results(out, {"model": "m"}, source=source) as results:
        assert results.rows == whole


def newlines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_newlines(path: Path, count: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while newlines(path) < count:
        assert time.monotonic() < end
        time.sleep(0.005)
