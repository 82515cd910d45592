"""Prompts and answers that are no local file of rows."""

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from griffin_offload.cli.main import griffin
from tiny import tiny_checkpoint

from griffin_offload.errors import GriffinError, OptionError
from griffin_offload.jsonl import read_rows
from griffin_offload.many.elsewhere import is_elsewhere, read_elsewhere, written_elsewhere

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Alice"},
    {"id": "b", "messages": [{"role": "user", "content": "Où?"}]},
    {"id": "c", "prompt": "Orange", "system": "Be brief."},
]


@pytest.fixture(autouse=True)
def needs_pyarrow() -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'griffin-offload[ray]'")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def rows_of(address: str) -> list[dict[str, Any]]:
    return read_rows(address, content=read_elsewhere(address))


def test_parquet_has_the_rows_of_jsonl(tmp_path: Path) -> None:
    names = dict.fromkeys(name for row in ROWS for name in row)  # a column for each field, most of them empty
    path = parquet(tmp_path / "in.parquet", [{name: row.get(name) for name in names} for row in ROWS])
    assert is_elsewhere(str(path))
    assert rows_of(str(path)) == ROWS


def test_an_address_is_read_as_the_file_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "in.jsonl", ROWS)
    assert is_elsewhere(path.as_uri())
    assert not is_elsewhere(str(path))
    assert rows_of(path.as_uri()) == ROWS


def test_a_folder_is_read_file_by_file_in_the_order_of_their_names(tmp_path: Path) -> None:
    parquet(tmp_path / "2.parquet", ROWS[1:2])
    jsonl(tmp_path / "3.jsonl", ROWS[2:])
    (tmp_path / "1.jsonl").write_text(json.dumps(ROWS[0]))  # without a newline at its end
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "_temporary").mkdir()
    assert is_elsewhere(str(tmp_path))
    assert rows_of(str(tmp_path)) == rows_of(tmp_path.as_uri()) == ROWS


def test_each_file_of_a_folder_may_begin_with_a_mark_of_its_bytes_order(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row), "utf-8-sig")
    assert rows_of(str(tmp_path)) == ROWS


def test_other_columns_of_parquet_may_hold_what_is_no_json(tmp_path: Path) -> None:
    columns = {"when": datetime(2024, 1, 1), "raw": b"\xff", "score": float("nan")}
    rows = [{"id": number, "prompt": "Alice", **columns} for number in range(3)]
    assert rows_of(str(parquet(tmp_path / "a.parquet", rows))) == [
        {"id": number, "prompt": "Alice"} for number in range(3)
    ]
    with pytest.raises(GriffinError, match="has no column prompt or messages; it has text"):
        rows_of(str(parquet(tmp_path / "b.parquet", [{"text": "Alice"}])))


def test_what_cannot_be_read_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(GriffinError, match=r"holds no \.jsonl, \.json, \.parquet"):
        read_elsewhere(str(tmp_path / "empty"))
    for address in (str(tmp_path / "none.parquet"), (tmp_path / "none").as_uri(), "nothing://here/x"):
        with pytest.raises(GriffinError, match="cannot read") as told:
            read_elsewhere(address)
        assert "\n" not in str(told.value)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(GriffinError, match="cannot read"):
        read_elsewhere(str(tmp_path / "bad.parquet"))
    monkeypatch.setattr("griffin_offload.many.elsewhere.ROWS", 100)
    jsonl(tmp_path / "1.jsonl", ROWS)
    with pytest.raises(GriffinError, match="more rows than 100 B"):
        read_elsewhere(tmp_path.as_uri())
    monkeypatch.setattr("griffin_offload.many.elsewhere.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'griffin-offload\[ray\]'"):
        read_elsewhere(str(tmp_path))


def test_answers_are_put_at_an_address_once_they_are_whole(tmp_path: Path) -> None:
    there = tmp_path / "out.jsonl"
    with suppress(KeyboardInterrupt), written_elsewhere(there.as_uri()) as local:  # stopped
        local.write_text("half")
        local.with_name(local.name + ".state").touch()
        raise KeyboardInterrupt
    assert not there.exists()
    with suppress(GriffinError), written_elsewhere(there.as_uri()) as again:
        assert again == local
        assert again.read_text() == "half"
        again.write_text("whole")
        again.with_name(again.name + ".state").unlink()
        raise GriffinError("1 of 2 prompts has no answer")  # all the same, the run is at its end
    assert there.read_text() == "whole"


def test_a_run_from_one_address_to_another(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "llama", "llama", chat=True)
    (tmp_path / "in").mkdir()
    parquet(tmp_path / "in" / "1.parquet", ROWS[:1])
    jsonl(tmp_path / "in" / "2.jsonl", ROWS[1:])
    source, there, plain = jsonl(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl", tmp_path / "plain.jsonl"

    def run(given: str, output: str) -> str:
        options = ["--model", str(model), "--sparsity", "0.5", "--greedy", "--max-new-tokens", "4", "--device", "cpu"]
        done = CliRunner().invoke(griffin, ["generate", "--input", given, "--output", output, *options])
        assert done.exit_code == 0, done.output
        return done.stderr

    def untimed(path: Path) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name != "timings"} for row in read_rows(path)]

    run(str(source), str(plain))
    assert f"its copy is {there.as_uri()}" in run((tmp_path / "in").as_uri(), there.as_uri())
    assert untimed(there) == untimed(plain)
    assert "are answered already" in run((tmp_path / "in").as_uri(), there.as_uri())
    assert untimed(there) == untimed(plain)


def test_a_small_parquet_file_of_very_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "in.parquet", [{"prompt": "Alice " * 200}] * 2000)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr("griffin_offload.many.elsewhere.ROWS", 1_000_000)
    with pytest.raises(GriffinError, match="the most that is read here"):
        read_elsewhere(str(path))
