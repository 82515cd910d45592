"""How fast each format is: what is measured here, and how it is kept."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.model import format_speeds
from griffin_offload.model.bandwidth import memory_bandwidth
from griffin_offload.model.format_speeds import Speeds, known_speeds, measure_speeds, measured_speeds, speeds_key
from griffin_offload.quant.formats import FORMATS
from griffin_offload.units import MIB

MADE_UP = {"": 3e9, "int8": 2e9, "int4": 1e9}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache's file, and a measurement that this process has not made yet."""
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path))
    monkeypatch.setattr(format_speeds, "SECONDS", 0.0)
    monkeypatch.setattr(format_speeds, "MOST", 0.0)
    measured_speeds.cache_clear()
    yield tmp_path / "speeds.json"
    measured_speeds.cache_clear()


def write(file: Path, speeds: object, age: float = 0.0) -> None:
    key = speeds_key("cpu", torch.bfloat16)
    file.write_text(json.dumps({key: {"time": time.time() - age, "bytes_per_s": speeds}, "other": 1}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_this_machine_multiplies_every_format(dtype: torch.dtype) -> None:
    speeds = dict(measure_speeds("cpu", dtype, 16 * MIB).by_format)
    assert set(speeds) == set(FORMATS)
    assert all(math.isfinite(speed) and 1e6 < speed < 1e13 for speed in speeds.values()), speeds


def test_it_takes_longer_until_the_best_time_is_seen_three_times() -> None:
    assert not format_speeds._enough([1.0, 1.0], 9.0)
    assert not format_speeds._enough([1.0, 1.0, 1.0], 0.1)
    assert format_speeds._enough([1.0, 1.0, 1.09, 5.0], 0.2)
    assert not format_speeds._enough([1.0, 1.05, 1.2, 5.0], 0.2)
    assert format_speeds._enough([1.0, 2.0, 3.0], 0.7)


def test_what_was_measured_is_kept_and_read_again(file: Path) -> None:
    assert known_speeds("cpu", torch.bfloat16) is None
    assert not file.exists(), "nothing is measured by asking what is known"
    speeds = measured_speeds("cpu", torch.bfloat16)
    assert known_speeds("cpu", torch.bfloat16) == speeds
    measured_speeds.cache_clear()  # as another process
    assert measured_speeds("cpu", torch.bfloat16) == speeds
    assert known_speeds("cpu", torch.float16) is None
    assert [path.name for path in file.parent.iterdir()] == ["speeds.json"]


def test_another_version_of_torch_is_measured_anew(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, MADE_UP)
    assert known_speeds("cpu", torch.bfloat16) == Speeds(tuple(MADE_UP.items()))
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert known_speeds("cpu", torch.bfloat16) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\x00", *({**MADE_UP, "int8": bad} for bad in (0, -1, math.nan, math.inf, "x", None)), {}],
)
def test_a_broken_file_is_measured_anew(file: Path, content: object) -> None:
    if isinstance(content, str):
        file.write_text(content)
    else:
        write(file, content)
    assert known_speeds("cpu", torch.bfloat16) is None
    format_speeds._save(file, "key", Speeds(tuple(MADE_UP.items())))
    assert json.loads(file.read_text())["key"]["bytes_per_s"] == MADE_UP


def test_after_a_day_it_is_measured_again_and_the_best_counts(file: Path) -> None:
    """So that what a busy machine measured goes away by itself."""
    write(file, {"": 2000.0, "int8": 1e15, "int4": 2000.0}, age=3600)
    assert dict(measured_speeds("cpu", torch.bfloat16).by_format)["int4"] == 2000.0
    write(file, {"": 2000.0, "int8": 1e15, "int4": 2000.0}, age=25 * 3600)
    measured_speeds.cache_clear()
    found = dict(measured_speeds("cpu", torch.bfloat16).by_format)
    assert found["int8"] == 1e15
    assert found[""] > 1e6
    assert found["int4"] > 1e6
    assert json.loads(file.read_text())["other"] == 1, "what the file has of others stays"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path / "file"))
    format_speeds._save(format_speeds._path(), "key", Speeds(tuple(MADE_UP.items())))
    assert known_speeds("cpu", torch.bfloat16) is None


@pytest.fixture
def engine(case: Callable[[str], Case], file: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose model is not too small to be worth a measurement."""
    monkeypatch.setattr(format_speeds, "SMALL", 0)
    return Engine(case("llama").folder, device="cpu")


def test_only_a_choice_of_formats_is_worth_a_measurement(engine: Engine, file: Path) -> None:
    for options in ({"sparsity": 0.5}, {"sparsity": 0.5, "resident_dtype": "int8"}, {}):
        assert engine.plan(20, 4, **options).tokens_per_s is None
        assert not file.exists(), options
    assert engine.plan(20, 4, resident_dtype="int8").tokens_per_s > 0
    assert file.exists()
    assert engine.plan(20, 4, sparsity=0.5, method="griffin").tokens_per_s > 0, "what is known is told"


def test_a_small_model_is_not_worth_one(case: Callable[[str], Case], file: Path) -> None:
    engine = Engine(case("llama").folder, device="cpu")
    assert engine.plan(20, 4, resident_dtype="auto", sparsity=0.5, method="griffin").tokens_per_s is None
    assert not file.exists()


def test_the_report_has_what_was_expected_beside_what_was_measured(engine: Engine, file: Path) -> None:
    key = speeds_key("cpu", torch.float32)
    file.write_text(json.dumps({key: {"time": time.time(), "bytes_per_s": MADE_UP}}))
    report = engine.generate(tiny_prompt(20), sparsity=0.5, method="griffin", max_new_tokens=4).report
    expected = MADE_UP[""] / report.plan.bytes_per_token
    assert report.to_json()["timings"]["expected_tokens_per_s"] == pytest.approx(expected)
    assert f"tokens/s ({expected:.1f} expected)" in dict(report.rows())["decoding"]


def test_speeds_that_a_run_exceeds_are_measured_again(engine: Engine, file: Path) -> None:
    """They were measured while other programs had the cores."""
    key, slow = speeds_key("cpu", torch.float32), dict.fromkeys(MADE_UP, 2000.0)
    file.write_text(json.dumps({key: {"time": time.time(), "bytes_per_s": slow}}))
    asked = {"sparsity": 0.5, "method": "griffin", "max_new_tokens": 20, "min_new_tokens": 20}
    report = engine.generate(tiny_prompt(20), **asked).report
    assert "expected" not in dict(report.rows())["decoding"]
    assert json.loads(file.read_text())[key]["time"] == 0
    again = measured_speeds("cpu", torch.float32)
    assert again.dense > 1e6
    assert time.time() - json.loads(file.read_text())[key]["time"] < 60


def test_a_limit_that_was_exceeded_is_not_told(engine: Engine) -> None:
    report = engine.generate(tiny_prompt(20), sparsity=0.5, method="griffin", max_new_tokens=4).report
    limit = report.decode_tokens_per_s * report.bytes_per_token
    for bandwidth, told in ((2 * limit, "50% of the"), (limit / 2, "bandwidth was disturbed")):
        pace = dict(replace(report, memory_bandwidth=bandwidth).rows())["decoding"]
        assert told in pace
        assert ("%" in pace) == (bandwidth > limit)


def test_the_bandwidth_of_matrices_of_one_width_and_several_dtypes() -> None:
    codes = torch.ones(64, 2048, dtype=torch.uint8)  # read as bfloat16, 1024 columns
    assert memory_bandwidth([torch.ones(64, 1024), codes, torch.ones(64, 1024, dtype=torch.bfloat16)]) > 0
