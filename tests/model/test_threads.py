"""The number of threads follows the cores that are free, and is the program's own again afterwards."""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint

import griffin_offload.model.threads as threads_module
from griffin_offload import Engine
from griffin_offload.model.threads import LONG, CoreTimes, Threads, fitting, taken

PROMPT = [5, 9, 3, 7, 12, 4]
START = CoreTimes(moment=100.0, cores=4, idle=50.0, nice=7.0, own=3.0)


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    """What the program has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Others:
    """Made-up times: those of other programs on four cores, at every look from now on."""

    def __init__(self) -> None:
        self.cores = self.low = 0.0  # that they use, and that those of low priority use among them
        self._last = START

    def now(self) -> CoreTimes:
        last = self._last
        idle, nice = last.idle + 4 - self.cores, last.nice + self.low
        self._last = replace(last, moment=last.moment + 1, idle=idle, nice=nice)
        return self._last


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    made_up = Others()
    monkeypatch.setattr(CoreTimes, "now", made_up.now)
    monkeypatch.setattr(threads_module, "WINDOW", -math.inf)  # look every time
    return made_up


@pytest.mark.parametrize(
    ("most", "cores", "busy", "threads"),
    [
        *[(2, 2, 0, 2), (2, 2, 0.3, 2), (2, 2, 0.67, 1), (2, 2, 1, 1), (2, 2, 2, 1), (4, 2, 0, 4), (1, 8, 0, 1)],
        *[(8, 8, 1, 7), (8, 8, 2.2, 6), (8, 8, 8, 1), (8, 16, 4, 8), (8, 16, 12, 4)],
    ],
)
def test_as_many_as_there_are_free_cores(most: int, cores: int, busy: float, threads: int) -> None:
    assert fitting(most, cores, busy) == threads


def test_what_others_take_is_what_is_neither_idle_nor_ones_own() -> None:
    def after(idle: float, own: float, nice: float = 0.0) -> tuple[float, float]:
        return taken(START, CoreTimes(START.moment + 2, 4, START.idle + idle, START.nice + nice, START.own + own))

    assert after(idle=8, own=0) == (0, 0)
    assert after(idle=0, own=8) == (0, 0)  # all four cores are one's own
    assert after(idle=2, own=2) == (2, 0)
    assert after(idle=8.1, own=0.1) == (0, 0)  # the system's counts are coarse
    assert after(idle=0, own=2, nice=4) == (3, 2)
    assert after(idle=0, own=6, nice=8) == (1, 1)  # this program's own priority is low
    assert taken(replace(START, idle=0, nice=0), CoreTimes(START.moment + 2, 4, 0, 0, START.own)) == (0, 0)
    assert taken(START, replace(START, moment=START.moment + 2, cores=3)) == (0, 0)


def test_short_work_gives_cores_up_and_long_work_does_not(others: Others) -> None:
    threads = Threads(largest=1000)
    for busy, number in ((3.0, 1), (2.0, 2), (0.0, 4), (1.0, 3)):
        others.cores = busy
        with threads.fitted(1):
            assert torch.get_num_threads() == number
        assert torch.get_num_threads() == 4
    with threads.fitted(LONG // 1000 + 1):
        assert torch.get_num_threads() == 4
    torch.set_num_threads(2)  # never more than the program has now
    others.cores = 0.0
    with threads.fitted(1):
        assert torch.get_num_threads() == 2
    others.cores = 3.0
    with pytest.raises(KeyError), threads.fitted(1):
        raise KeyError
    assert torch.get_num_threads() == 2
    threads.adapts = False
    with threads.fitted(1):
        assert torch.get_num_threads() == 2


def test_programs_of_low_priority_show_now_and_then_whether_they_give_way(others: Others) -> None:
    threads = Threads(largest=1000)

    def number() -> int:
        with threads.fitted(1):
            return torch.get_num_threads()

    others.cores, others.low = 3.0, 2.0
    assert [number() for _ in range(int(threads_module.TRIAL) + 2)].count(3) == 2  # at first, and once more
    others.cores = others.low = 0.0  # they do
    assert number() == 4


def test_layers_that_stream_and_tokens_run_on_what_fits(others: Others, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)
    engine = Engine(folder)
    seen: list[int] = []
    handle = engine.skeleton.modules[-1].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    others.cores = 2.0
    between: list[int] = []
    options = {"sparsity": 0.5, "max_new_tokens": 3, "greedy": True, "no_fidelity": True}
    free = engine.generate(PROMPT, on_text=lambda _: between.append(torch.get_num_threads()), **options)
    assert set(between) == {2}  # sampling would wait for a core otherwise
    assert (seen, torch.get_num_threads(), free.report.threads) == ([2, 2, 2], 4, 2)
    assert ("threads: 2") in dict(free.report.rows())["decoding"]
    handle.remove()
    fixed = Engine(folder, threads=3)
    answer = fixed.generate(PROMPT, **options)
    assert (torch.get_num_threads(), answer.report.to_json()["timings"]["threads"]) == (3, 3)
    assert answer.token_ids == free.token_ids


def test_several_answers_with_neurons_of_their_own_leave_the_number_as_it_was(others: Others, tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"))
    others.cores = 3.0
    engine.generate_batch([PROMPT, PROMPT[:3]], per_prompt=True, sparsity=0.5, method="griffin", max_new_tokens=3)
    assert torch.get_num_threads() == 4


@pytest.fixture
def large(tmp_path: Path) -> Engine:
    """An engine with a thread for each core, and products that all of them share."""
    cores = START.now().cores
    if cores < 2:
        pytest.skip("one core has one thread")
    torch.set_num_threads(cores)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    return Engine(tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes))


def speed(engine: Engine, adapts: bool, tokens: int) -> float:
    engine.skeleton.threads.adapts = adapts
    answer = engine.generate(PROMPT, sparsity=0, max_new_tokens=tokens, min_new_tokens=tokens)
    return answer.report.decode_tokens_per_s


def ratio(engine: Engine, tokens: int, fixed: int, enough: float) -> float:
    """Tokens a second on the threads that fit, `tokens` of them, by those of `fixed` tokens on a thread for each core:
    the best of a few, until one is `enough`."""
    found = 0.0
    for _ in range(5):
        found = max(found, speed(engine, True, tokens) / speed(engine, False, fixed))
        if found >= enough:
            break
    return found


def test_busy_programs_do_not_stop_the_answer(large: Engine) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(torch.get_num_threads())]
    try:
        time.sleep(1)
        speed(large, True, 8)  # it looks at what others use
        assert ratio(large, 24, 3, enough=2) > 1.5
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_free_cores_are_used(large: Engine) -> None:
    before = CoreTimes.now()
    time.sleep(1)
    if taken(before, CoreTimes.now())[0] > 0.1:
        pytest.skip("other programs use the cores")
    speed(large, True, 8)
    assert ratio(large, 40, 40, enough=0.95) > 0.9
