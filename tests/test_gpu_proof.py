"""scripts/gpu_proof.py: the table that it makes of measurements."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def proof() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "gpu_proof.py"
    spec = importlib.util.spec_from_file_location("gpu_proof", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(label: str, **facts: Any) -> dict[str, Any]:
    times = ("prompt_s", "prompt_again_s", "x_floor", "x_floor_again", "tokens_per_s", "of_limit", "load_s")
    nothing = dict.fromkeys((*times, "peak_bytes", "ram_peak_bytes", "note", "error"))
    return {"label": label, "method": label.partition(" ")[0], "runs": 1, **nothing, **facts}


def test_each_number_stands_beside_its_limit(proof: ModuleType) -> None:
    warm = row("griffin 50%", prompt_s=1.5, x_floor=2.0, prompt_again_s=0.6, x_floor_again=1.25, tokens_per_s=117.4,
               of_limit=0.62, peak_bytes=2**34, ram_peak_bytes=2**35)  # fmt: skip
    head, line, cells = proof.table([warm], [row("griffin 50%", prompt_s=12.0, x_floor=1.1111)])
    assert head.count("|") == line.count("|") == cells.count("|")
    assert [cell.strip() for cell in cells.split("|")[1:-1]] == [
        *("griffin 50%", "12.00", "90%", "1.50", "50%", "0.60", "80%", "117", "62%", "16.00 GiB", "32.00 GiB", ""),
    ]


def test_what_loads_first_has_no_limit_for_its_prompt(proof: ModuleType) -> None:
    cells = proof.cells(row("accelerate", prompt_s=1.2, x_floor=0.5, load_s=8.8, peak_bytes=2**30), {})
    assert cells[1:7] == ("-", "-", "1.20", "-", "-", "-")
    assert cells[-1] == "loads for 8.8 s before"


def test_what_failed_is_told_and_what_was_left_out_is_none(proof: ModuleType) -> None:
    rows = [
        row("griffin 50% compiled", error="not run: no compiler", runs=0),
        row("full", error="out of memory", runs=0),
        row("griffin 50%", tokens_per_s=1.0),
    ]
    assert proof.failures({"returncode": 1, "summary": "2 failed"}, rows) == [
        "pytest -m gpu: 2 failed",
        "full: out of memory",
    ]
    assert proof.failures({"returncode": 0, "summary": "9 passed"}, rows[::2]) == []
    assert proof.cells(rows[1], {})[-1] == "out of memory"


def test_the_machine_and_its_limits_are_told(proof: ModuleType) -> None:
    card = {"name": "A card", "driver": "570.1", "bus_bandwidth": 55e9, "memory_bandwidth": 3.3e12}
    warm = {
        **{"device_facts": card, "reading": {"bandwidth": 36e9}, "arithmetic": {"512": {"seconds": 0.05}}},
        **{"cores": 16, "ram_bytes": 2**37, "torch": "2.11.0", "transformers": "5.23.0", "python": "3.11.7"},
        **{"model": "m", "file_bytes": 26 * 10**9, "budget_bytes": 20 * 2**30, "conditions": "caches warm"},
    }
    told = "\n".join(proof.header(warm, {"reading": {"bandwidth": 2e9}}, {"summary": "11 passed"}, 300.0))
    assert told.startswith("A card, driver 570.1; 16 cores, 128.00 GiB of RAM; torch 2.11.0")
    assert "Limits: disk 2.00 GB/s, page cache 36.00 GB/s, bus 55.00 GB/s, device memory 3300.00 GB/s" in told
    assert "512 tokens of prompt 0.050 s" in told
    assert "disk" not in proof.header(warm, {}, {"summary": ""}, 1.0)[2]
