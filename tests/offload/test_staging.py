"""Layers that come to their device in pinned pieces, by several threads: the oracle's answers, stages timed, RAM kept.

The device is the CPU, whose copies are plain; tests/offload/test_gpu.py runs the same lines with streams."""

import gc
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from cases import Case
from engines import assert_equals_oracle, copying, reading_threads
from griffin_offload.cli.mem_report import last_rows
from rings import LAYERS, seen_by_each_layer, seen_by_slow_streams
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.errors import CheckpointError
from griffin_offload.memory import host_cache, upload
from griffin_offload.memory.stage_clock import StageClock
from griffin_offload.memory.upload import Plain, Ring, ring_for
from griffin_offload.offload import layer_stream
from griffin_offload.options import Pruning
from griffin_offload.units import GIB, KIB, MIB, format_bytes

SIZES = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8}
LAYER = 3 * 4 * 256 * 2048  # bytes of one feed-forward block in float32


@pytest.fixture
def tiny_ring(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """tiny_ring(threads): pieces much smaller than a layer, and only one more than threads."""

    def set_ring(threads: int) -> None:
        monkeypatch.setattr(layer_stream, "ring_for", lambda *_: Ring(threads, threads + 1, 16 * KIB))

    return set_ring


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_any_number_of_threads_gives_the_oracles_answers(
    case: Callable[[str], Case], tiny_ring: Callable[[int], None], kind: str, threads: int
) -> None:
    tiny_ring(threads)
    folder = case(kind).folder
    engine = copying(folder, dtype="float32", host_memory="1GiB")
    for seed in range(2):  # the second prompt finds its layers in RAM
        assert_equals_oracle(folder, tiny_prompt(30, seed), 0.5, engine, tokens=4)


def test_neither_slots_nor_pieces_are_overwritten_or_read_too_early() -> None:
    seen, clock = seen_by_each_layer("cpu", 16 * KIB, 64)
    assert seen == [[layer + 1] * 2 for layer in range(LAYERS)]
    assert clock.host_bytes <= 5 * 16 * KIB, "the ring, and no more"


@pytest.mark.parametrize(("copying", "computing"), [(0.001, 0), (0, 0.004)])
def test_a_device_that_is_late_sees_every_layer_as_it_was_sent(copying: float, computing: float) -> None:
    """Copies and layers run behind what was submitted, as on streams: the bus is late, or the layers are."""
    assert seen_by_slow_streams(4 * KIB, copying, computing) == [[layer + 1] * 2 for layer in range(LAYERS)]


@pytest.mark.parametrize("threads", [1, 4])
def test_weights_are_converted_by_threads(tmp_path: Path, tiny_ring: Callable[[int], None], threads: int) -> None:
    tiny_ring(threads)
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.float32)
    engine = copying(folder, dtype="bfloat16")
    engine.generate(tiny_prompt(), sparsity=0, max_new_tokens=1)
    expected, actual = oracle.load(folder, torch.bfloat16).state_dict(), engine.skeleton.model.state_dict()
    held = {name: tensor for name, tensor in expected.items() if name != engine.skeleton.layout.table}
    assert all(torch.equal(actual[name], tensor) for name, tensor in held.items())


def test_a_file_that_ends_too_early_is_told_and_all_threads_end(
    tmp_path: Path, tiny_ring: Callable[[int], None]
) -> None:
    tiny_ring(4)
    folder = tiny_checkpoint(tmp_path / "m", "llama", **SIZES)
    engine = copying(folder)
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size // 2)
    with pytest.raises(CheckpointError, match="has changed since the model was opened"):
        engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2)
    assert reading_threads() == []


def test_a_stop_in_the_middle_ends_all_threads_and_the_next_prompt_is_answered(
    tmp_path: Path, tiny_ring: Callable[[int], None]
) -> None:
    tiny_ring(4)
    folder = tiny_checkpoint(tmp_path / "m", "llama", num_hidden_layers=6)
    engine = copying(folder, host_memory="1GiB")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch([tiny_prompt()], sparsity=0.5, method="griffin", max_new_tokens=2, on_layer=stop)
    assert reading_threads() == []
    assert_equals_oracle(folder, tiny_prompt(), 0.5, engine, tokens=4)


def test_the_weights_of_an_earlier_plan_go_before_the_next_ones_come(case: Callable[[str], Case]) -> None:
    """At once, not when Python next looks for cycles: a GPU would hold both."""
    engine = copying(case("llama").folder)
    engine.generate(tiny_prompt(), sparsity=0, max_new_tokens=2)
    held = weakref.ref(next(iter(engine.resident.layers[0].tensors.values())))
    gone = []
    gc.disable()
    try:
        engine.generate(tiny_prompt(), sparsity=0.5, max_new_tokens=2, on_layer=lambda *_: gone.append(held() is None))
    finally:
        gc.enable()
    assert gone
    assert all(gone)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("large") / "m", "llama", **SIZES)


@pytest.fixture
def not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cache has no checkpoint, as far as anybody can tell, and all are large beside the free memory."""
    monkeypatch.setattr("griffin_offload.open_model.mostly_cached", lambda files: False)
    monkeypatch.setattr("griffin_offload.open_model.available_memory", lambda: 8 * 5 * LAYER)


def two_prompts(engine: Engine) -> tuple[list[int], list[int]]:
    """Layers that the plans hold, and bytes that were read, of two prompts."""
    reports = [
        engine.generate(tiny_prompt(40, s), sparsity=0.5, method="griffin", max_new_tokens=2).report for s in range(2)
    ]
    return [report.plan.held_layers for report in reports], [report.bytes_read for report in reports]


@pytest.mark.usefixtures("not_in_the_cache")
def test_free_ram_is_a_tier_by_default(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cache, "available_memory", lambda: 64 * GIB)
    engine = copying(large)
    held, read = two_prompts(engine)
    assert held == [8, 8]
    assert read[0] > 8 * LAYER > 100 * read[1]
    report = engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2).report
    assert 8 * LAYER <= report.measured_host <= report.plan.host_peak
    cells = {row[0]: row[1:] for row in last_rows(report.to_json())[1]}
    assert cells["RAM"][:2] == (format_bytes(report.plan.host_peak), format_bytes(report.measured_host))
    assert "bound by" in cells["prompt pass"][2]
    without = replace(engine.opened, host_memory=0).plan(48, 2, Pruning(sparsity=0.5, method="griffin"))
    assert without.held_layers == 0
    assert without.peak == report.plan.peak, "the device's memory is another"
    assert Engine(large).plan(40, sparsity=0.5, method="griffin").held_layers == 0, "on the CPU it is asked for"


@pytest.mark.usefixtures("not_in_the_cache")
@pytest.mark.parametrize(("size", "layers"), [("0", 0), (3 * LAYER + 2**18, 3), (None, 0)])
def test_a_size_limits_the_tier_and_others_keep_their_ram(
    large: Path, monkeypatch: pytest.MonkeyPatch, size: str | int | None, layers: int
) -> None:
    """None: nothing is free but what is left to others."""
    if size is None:
        monkeypatch.setattr(host_cache, "available_memory", lambda: 2 * GIB)
    held, read = two_prompts(copying(large, host_memory=size))
    assert held == [layers, layers]
    assert read[1] == pytest.approx((8 - layers) * LAYER, abs=100_000)


def test_what_the_page_cache_has_is_not_held_twice_unless_it_is_asked_for(large: Path) -> None:
    assert copying(large).plan(40, sparsity=0.5, method="griffin").held_layers == 0  # just written, and small
    assert copying(large, host_memory="1GiB").plan(40, sparsity=0.5, method="griffin").held_layers == 8


def test_ram_that_others_take_meanwhile_is_not_filled_and_is_given_back(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copying(large, host_memory="1GiB")
    free = 64 * GIB
    monkeypatch.setattr(host_cache, "available_memory", lambda: free - engine.resident.host_bytes)
    monkeypatch.setattr(host_cache, "container_limit", lambda: 10 * GIB)  # of which 2 GiB are left to others
    free = 2 * GIB + 4 * LAYER
    assert two_prompts(engine)[1][1] == pytest.approx(4 * LAYER, abs=2 * LAYER)
    assert 3 * LAYER <= engine.resident.host_bytes <= 5 * LAYER
    free = 2 * GIB + 2 * LAYER  # others have grown
    two_prompts(engine)
    assert engine.resident.host_bytes <= 2 * LAYER


def test_seconds_of_the_stages_add_up(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []
    engine = copying(large, host_memory="1GiB")
    for seed in range(2):
        report = engine.generate(tiny_prompt(40, seed), sparsity=0.5, method="griffin", max_new_tokens=2).report
        found = report.stages
        assert found
        assert 0 < found.total <= report.prompt_s
        assert 0 < found.compute + found.wait <= found.total
        assert 0 < found.bus <= found.total
        assert 0 <= found.read <= found.total
        assert 0 < found.host_copy <= found.total  # to the tier; then from it
        assert dict(report.rows())["bound by"] == str(found)
        assert report.to_json()["io"]["stages"]["bound_by"] == found.bound_by
        stages.append(found)
    assert stages[0].read > stages[1].read == 0
    on_the_cpu = Engine(large).generate(tiny_prompt(40), sparsity=0.5, method="griffin", max_new_tokens=2).report.stages
    assert on_the_cpu
    assert (on_the_cpu.threads, on_the_cpu.bus, on_the_cpu.host_copy) == (1, 0, 0)
    assert on_the_cpu.compute + on_the_cpu.wait == pytest.approx(on_the_cpu.total)
    again = Engine(large)
    again.generate(tiny_prompt(40), sparsity=0, max_new_tokens=2)
    assert again.generate(tiny_prompt(40), sparsity=0, max_new_tokens=2).report.stages is None, "nothing was read"


def test_the_stage_that_works_longest_bounds_the_pass() -> None:
    clock = StageClock()
    clock.add("read", 9.0)  # of the outer weights, by one thread before the pass
    assert clock.stages() is None
    clock.start(4)
    clock.add("read", 4.0)
    clock.add("host_copy", 2.0)
    clock.add("wait", 0.5)
    begin, end = Plain(), Plain()
    begin.record()
    time.sleep(0.01)
    end.record()
    clock.span("bus", begin, end)
    clock.span("compute", begin, end)
    clock.stop()
    found = clock.stages()
    assert found
    assert (found.read, found.host_copy, found.wait, clock.read) == (1.0, 0.5, 0.5, 10.0)
    assert found.bus == found.compute == pytest.approx(0.01, abs=0.05)
    assert str(found) == f"reading (1.00 of {found.total:.2f} s)"
    assert found.to_json()["bound_by"] == "reading"
    assert str(replace(found, compute=3.0, total=3.1)) == "computing (3.00 of 3.10 s)"


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (4, 3), (16, 12), (128, 12)])
def test_threads_by_cores(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    ring = ring_for("cuda")
    assert ring.threads == threads < ring.pieces
    assert ring.bytes <= 512 * MIB
    assert ring_for("cuda", converts=True).threads == min(threads, upload.DECODERS)
    assert ring_for("mps").threads == 1
