"""How steps are recorded, by torch's rules for CUDA graphs: its allocator's pools, its streams, its warnings."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from griffin_offload.memory import capture
from griffin_offload.memory.capture import Capture


class Cuda:
    """What torch.cuda has for graphs. `log`: what was done, in order; `ends`: whether CUDA ends a recording that
    failed."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.users: dict[int, int] = {}  # graphs of each pool
        self.mode, self.told, self.stream, self.ends = 0, False, "computing", True

    def install(self, patch: pytest.MonkeyPatch) -> "Cuda":
        cuda = self

        class Stream:
            def __init__(self, name: str = "recording") -> None:
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                cuda.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            pool = 0

            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert cuda.stream == "recording"
                if cuda.users.get(pool) == 0:
                    raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
                cuda.users[pool], self.pool = cuda.users.get(pool, 0) + 1, pool
                cuda.log.append("begin")

            def capture_end(self) -> None:
                cuda.log.append("end")
                if not cuda.ends:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                cuda.log.append("replay")

            def __del__(self) -> None:
                if self.pool:
                    cuda.users[self.pool] -= 1

        class Generator:
            def clone_state(self) -> str:
                return "copy"

            def graphsafe_set_state(self, state: str) -> None:
                cuda.log.append(f"numbers of the {state}")

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, cuda.stream = cuda.stream, chosen.name
            yield
            cuda.stream = before

        def set_mode(mode: Any) -> None:
            cuda.mode = {"error": 2}.get(mode, mode)
            if not cuda.told:  # once in a process
                cuda.told = True
                warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)

        answers: dict[str, Callable[..., object]] = {
            "synchronize": lambda: self.log.append("synchronize"),
            "empty_cache": lambda: self.log.append("give back"),
            "graph_pool_handle": lambda: len(self.users) + 1,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": set_mode,
            "current_stream": lambda: Stream(self.stream),
            "current_device": lambda: 0,
            "stream": stream,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch.cuda, "default_generators", (Generator(),))
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: self.log.append("end pool"), raising=False)
        return self


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    capture._stream.cache_clear()
    monkeypatch.setattr(capture, "_refused", [])
    yield Cuda().install(monkeypatch)
    capture._stream.cache_clear()


def test_each_recording_has_memory_of_its_own_after_the_last_one_is_gone(cuda: Cuda) -> None:
    steps, modes = Capture("cuda"), []
    for name in "aaaabbbb":
        steps.run(name, lambda: modes.append((cuda.mode, cuda.stream)))
    assert (steps.count, steps.failed) == (2, "")
    assert cuda.users == {1: 0, 2: 1}
    checked = ["recording waits for computing", "computing waits for recording"]
    assert cuda.log == [*checked, "synchronize", "give back", "begin", "end", "replay", "replay"] * 2
    assert modes == [(0, "computing"), (2, "recording"), (0, "recording")] * 2
    assert cuda.mode == 0


def test_that_the_check_is_a_prototype_is_no_error(cuda: Cuda) -> None:
    with Capture("cuda")._without_waiting():
        assert (cuda.mode, cuda.told) == (2, True)
    assert cuda.mode == 0


@pytest.mark.parametrize("ends", [True, False])
def test_only_a_recording_that_cannot_be_ended_is_the_last_one_of_the_process(cuda: Cuda, ends: bool) -> None:
    cuda.ends = ends

    def step() -> None:
        ran.append(cuda.log[-1] if cuda.log else "")
        if ran[-1] == "begin":
            raise torch.OutOfMemoryError("CUDA out of memory")

    ran: list[str] = []
    steps = Capture("cuda")
    for _ in range(4):
        steps.run("a", step)
    assert len(ran) == 5  # the recording failed, so the third token was computed after all
    assert (steps.count, steps.failed) == (0, "CUDA out of memory")
    assert ("end pool" in cuda.log) == ("numbers of the copy" in cuda.log) == (not ends)
    assert Capture("cuda").failed == ("" if ends else "CUDA has refused a recording in this process")


def test_a_recording_without_memory_gives_back_what_it_took_before_the_token_is_computed(cuda: Cuda) -> None:
    taken: list[weakref.ref[torch.Tensor]] = []
    free: list[bool] = []

    def step() -> None:
        free.append(all(each() is None for each in taken))
        states = torch.zeros(1)
        if cuda.log and cuda.log[-1] == "begin":
            taken.append(weakref.ref(states))
            raise torch.OutOfMemoryError("CUDA out of memory")

    steps = Capture("cuda")
    for _ in range(3):
        steps.run("a", step)
    assert (len(taken), free, cuda.users) == (1, [True] * 4, {1: 0})
