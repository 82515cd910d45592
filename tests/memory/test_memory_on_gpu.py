"""Memory on a GPU: peaks, budgets and errors are told truly; skipped without CUDA."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import CARDS
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import BudgetError
from griffin_offload.model.format_speeds import measure_speeds
from griffin_offload.units import MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What an earlier test's engine holds would count."""
    gc.collect()


LAYERS = 4 if CARDS else 8
FREED = (LAYERS - 2) * 12 * MIB  # at least, by half of the bytes: two layers pass through
WIDE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": LAYERS}


def test_each_run_of_a_process_has_its_own_peak(tmp_path: Path) -> None:
    """What an earlier plan took, and torch's allocator kept, does not count; the context does, in plan and peak."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **WIDE)
    engine = Engine(folder, device="cuda")
    plans: list[dict[str, object]] = [{"sparsity": 0}, {"resident_dtype": "int8"}, {"sparsity": 0.75}, {"sparsity": 0}]
    reports = [engine.generate(tiny_prompt(), max_new_tokens=4, **plan).report for plan in plans]  # type: ignore[arg-type]
    for report in reports:
        context = report.plan.rows[0]
        assert context.name == "CUDA context and libraries"
        assert context.bytes < report.measured_peak <= report.plan.peak
    whole, int8, pruned, again = (report.measured_peak for report in reports)
    assert int8 < whole - FREED
    assert pruned < whole - FREED
    assert abs(again - whole) < LAYERS * 8 * MIB


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"resident_dtype": "int8", "rest": "int4"}], ids=str)
def test_what_an_answer_takes_goes_with_it(tmp_path: Path, options: dict[str, Any], prompts: int) -> None:
    """At once, not when Python next looks for cycles: the next answer's KV cache would come beside this one's."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", hidden_size=256)
    if prompts > 1 and "lossless" in options:
        pytest.skip("one prompt at a time is answered so")
    engine, held = Engine(folder, device="cuda", dtype="float32"), []
    gc.disable()
    try:
        for _ in range(3):
            engine.generate_batch(
                [tiny_prompt(48, seed) for seed in range(prompts)], sparsity=0.5, max_new_tokens=16, **options
            )
            held.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert held[0] == held[1] == held[2]


def test_two_engines_of_a_process_each_stay_inside_their_plan(tmp_path: Path) -> None:
    """The second one's plan counts what the first holds, as it does on a CPU."""
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **WIDE)
    first = Engine(folder, device="cuda")
    first.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=4)
    second = Engine(folder, device="cuda")
    report = second.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=4).report
    assert report.measured_peak <= report.plan.peak
    assert second.opened.runtime > first.opened.runtime + LAYERS * 12 * MIB


def test_out_of_memory_is_the_budget_error_and_the_engine_works_on(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **WIDE)
    engine = Engine(folder, device="cuda")
    before = engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False).token_ids

    def too_much(done: int, total: int) -> None:
        torch.empty(1 << 46, dtype=torch.uint8, device="cuda")

    for run in (engine.generate, engine.sweep):
        with pytest.raises(BudgetError, match="cuda is out of memory"):
            run(tiny_prompt(), sparsity=0.25, on_layer=too_much)
        assert torch.cuda.memory_allocated() < LAYERS * 12 * MIB
    after = engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False)
    assert after.token_ids == before


@pytest.mark.skipif(CARDS > 0, reason="an emulated card is one process's")
def test_what_another_process_holds_is_told_before_anything_is_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **WIDE)
    engine, read = Engine(folder, device="cuda", device_memory="100TiB"), []
    least = engine.plan(len(tiny_prompt()), 4, sparsity=0).peak
    hold = (
        "import sys, torch\n"
        f"kept = torch.empty(torch.cuda.mem_get_info()[0] - {least // 4}, dtype=torch.uint8, device='cuda')\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(BudgetError, match="where other processes hold"):
            engine.generate(tiny_prompt(), sparsity=0, on_layer=lambda *_: read.append(True))
        other.communicate()
    assert not read


@pytest.mark.skipif(CARDS > 0, reason="an emulated card has no speed")
def test_every_format_has_a_speed_below_what_the_card_can_do() -> None:
    """The launches are no part of it: with them, a token of int4 would seem slow on a fast card."""
    speeds = dict(measure_speeds("cuda", torch.bfloat16).by_format)
    assert all(1e9 < speed < 2e13 for speed in speeds.values()), speeds
