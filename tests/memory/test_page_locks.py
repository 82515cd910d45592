"""Layers in RAM that are page-locked between prompts: copied without a piece, unlocked before they go.

The driver is played by `Driver`; tests/offload/test_gpu.py asks CUDA's."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Case
from engines import assert_equals_oracle, copying
from griffin_offload.cli.mem_report import last_rows
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.engine import Answer
from griffin_offload.memory import host_cache, page_locks
from griffin_offload.memory.arena import PAGE
from griffin_offload.offload import resident_model
from griffin_offload.units import GIB

SIZES = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8}
LAYER = 3 * 4 * 256 * 2048  # bytes of one feed-forward block in float32


class Driver:
    """Locks memory; complains where it is locked twice, not locked, or freed while it is locked."""

    def __init__(self) -> None:
        self.most = 2**62  # bytes that may be locked
        self.asked = 0
        self.locked: dict[int, weakref.finalize] = {}
        self.freed: list[int] = []
        self.called, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def lock(self, memory: Tensor) -> bool:
        self.called.set()
        self.go_on.wait(60)
        self.asked += 1
        begin = memory.data_ptr()
        assert begin % PAGE == 0
        assert begin not in self.locked
        if memory.nbytes > self.most:
            return False
        self.most -= memory.nbytes
        self.locked[begin] = weakref.finalize(memory, self.freed.append, begin)
        return True

    def unlock(self, memory: Tensor) -> None:
        self.locked.pop(memory.data_ptr()).detach()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(resident_model, "locker_for", lambda device: driver)
    monkeypatch.setattr(page_locks, "PAUSE", 0)
    monkeypatch.setattr(host_cache, "available_memory", lambda: 64 * GIB)
    return driver


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("large") / "m", "llama", **SIZES)


def ask(engine: Engine, sparsity: float = 0.5, wait: bool = True) -> Answer:
    """Answers, and lets the driver lock what it can; without `wait` the next prompt comes at once."""
    answer = engine.generate(tiny_prompt(40), sparsity=sparsity, method="griffin", max_new_tokens=2, do_sample=False)
    if wait:
        engine.resident.wait_for_locks()
    return answer


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_later_prompts_get_the_oracles_answers(case: Callable[[str], Case], driver: Driver, kind: str) -> None:
    engine = copying(case(kind).folder, dtype="float32", host_memory="1GiB")
    for seed, sparsity in [(0, 0.5), (1, 0.5), (2, 0.9), (3, 0.5)]:
        assert_equals_oracle(case(kind).folder, tiny_prompt(40, seed), sparsity, engine, tokens=4)
        ask(engine, sparsity)
        assert len(driver.locked) == len(engine.skeleton.layers)


def test_locked_layers_need_no_piece_and_no_copy_in_ram(large: Path, driver: Driver) -> None:
    engine = copying(large, host_memory="1GiB")
    first, second = ask(engine).report, ask(engine).report
    assert first.locked_host == 0
    assert second.locked_host >= 8 * LAYER
    assert second.locked_host == second.to_json()["memory"]["host_locked_bytes"]
    assert "page-locked" in dict(second.rows())["kept in RAM"]
    assert any("page-locked" in row[3] for row in last_rows(second.to_json())[1])
    assert first.stages
    assert second.stages
    assert first.stages.host_copy > second.stages.host_copy == second.stages.read == 0 < second.stages.bus
    assert second.measured_host == engine.resident.host_bytes, "no pinned piece"
    assert driver.asked == 8, "once for all prompts"


def test_layers_that_are_given_up_are_unlocked_before(large: Path, driver: Driver) -> None:
    engine = copying(large, host_memory=8 * (LAYER + 3 * PAGE))
    ask(engine)
    engine.resident._tier.hold(3, 8)
    assert len(driver.locked) == 3
    assert ask(engine).report.stages.host_copy > 0
    assert len(driver.locked) == 8, "which a prompt has kept again"
    engine.unload()
    gc.collect()
    assert not driver.locked
    assert not driver.freed


def test_an_engine_that_goes_unlocks(large: Path, driver: Driver) -> None:
    ask(engine := copying(large, host_memory="1GiB"))
    assert len(driver.locked) == 8
    del engine
    gc.collect()
    assert not driver.locked
    assert not driver.freed


def test_what_is_refused_is_copied_through_pieces_and_not_asked_for_again(large: Path, driver: Driver) -> None:
    driver.most = int(2.5 * LAYER)
    engine = copying(large, host_memory="1GiB")
    tokens = [ask(engine).token_ids for _ in range(3)]
    report = ask(engine).report
    assert tokens == [tokens[0]] * 3
    assert 2 * LAYER <= report.locked_host <= driver.most + 2 * LAYER + 8 * PAGE
    assert report.stages.host_copy > 0
    assert driver.asked == 3


def test_nothing_is_locked_that_others_lack(large: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = copying(large, host_memory="1GiB")
    ask(engine, wait=False)
    engine.resident._tier.settle()
    before = len(driver.locked)
    monkeypatch.setattr(host_cache, "spare_memory", lambda: -1)
    engine.resident.answered()
    engine.resident.wait_for_locks()
    assert len(driver.locked) == before


def test_the_next_prompt_waits_for_one_layer_at_most(large: Path, driver: Driver) -> None:
    engine = copying(large, host_memory="1GiB")
    driver.go_on.clear()
    first = ask(engine, wait=False)
    assert driver.called.wait(60)
    timer = threading.Timer(0.2, driver.go_on.set)
    timer.start()
    second = ask(engine)
    assert second.token_ids == first.token_ids
    assert 0 < second.report.locked_host < 2 * LAYER
    assert len(driver.locked) == 8, "the others were locked behind it"
    timer.join()


def test_prompts_without_a_pause_between_them_wait_for_nothing(
    large: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_locks, "PAUSE", 60)
    engine = copying(large, host_memory="1GiB")
    begin = time.monotonic()
    for _ in range(3):
        ask(engine, wait=False)
    engine.unload()
    assert time.monotonic() - begin < 60
    assert not driver.asked


@pytest.mark.usefixtures("driver")
def test_the_cpu_locks_nothing(large: Path) -> None:
    engine = Engine(large, host_memory="1GiB")
    assert ask(engine).report.locked_host == ask(engine).report.locked_host == 0
