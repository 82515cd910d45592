"""Out of memory, for real, in the middle of everything that an engine does: one error, and the engine works on."""

import errno
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import BudgetError
from griffin_offload.memory.out_of_memory import is_out_of_memory, planned
from griffin_offload.offload.lockstep import forwards
from griffin_offload.offload.resident_model import State
from griffin_offload.pruning.calibration import Calibration

TOO_MUCH = 1 << 48  # bytes: more than an address space
PROMPT, OTHER = tiny_prompt(20), tiny_prompt(20, seed=1)


def too_much(*_: object) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def at_layer_two(done: int, total: int) -> None:
    if done == 2:
        too_much()


class InTheAnswer:
    """A logits processor that needs memory at the third token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            too_much()
        return scores


def passes(engine: Engine, **options: Any) -> None:
    with engine.passage(20, **options) as lockstep:
        lockstep.run(forwards(engine.skeleton, [PROMPT], engine.device))


def streams(engine: Engine) -> None:
    list(engine.stream(PROMPT, sparsity=0.5, method="griffin", on_layer=at_layer_two))


CALIBRATION = Calibration([PROMPT, OTHER])
RUNS: dict[str, Callable[[Engine, Path], object]] = {
    "generate": lambda e, _: e.generate(PROMPT, sparsity=0.5, method="griffin", on_layer=at_layer_two),
    "the whole model": lambda e, _: e.generate(PROMPT, sparsity=0, on_layer=at_layer_two),
    "answer": lambda e, _: e.generate(PROMPT, sparsity=0.5, method="griffin", logits_processor=[InTheAnswer()]),
    "batch": lambda e, _: e.generate_batch([PROMPT, OTHER], sparsity=0.5, method="griffin", on_layer=at_layer_two),
    "each": lambda e, _: e.generate_batch(
        [PROMPT, OTHER], sparsity=0.5, method="griffin", per_prompt=True, on_layer=at_layer_two
    ),
    "stream": lambda e, _: streams(e),
    "sweep": lambda e, _: e.sweep(PROMPT, sparsity=0.5, method="griffin", on_layer=at_layer_two),
    "passage": lambda e, _: passes(e, on_layer=at_layer_two),
    "export": lambda e, out: e.export(PROMPT, out, sparsity=0.5, prompt_text="", on_layer=at_layer_two),
    "export_static": lambda e, out: e.export_static(CALIBRATION, out, sparsity=0.5, on_layer=at_layer_two),
    "score_samples": lambda e, _: e.score_samples(CALIBRATION, at_layer_two),
}


@pytest.fixture(scope="module")
def folder(case: Callable[[str], Case]) -> Path:
    return case("llama").folder


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("copies", [False, True])
def test_it_is_one_error_and_nothing_is_left_half_done(folder: Path, tmp_path: Path, run: str, copies: bool) -> None:
    engine = Engine(folder, device="cpu", copies=copies)
    before = engine.generate(PROMPT, sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False).token_ids
    with pytest.raises(BudgetError, match=r"cpu is out of memory: .* were planned, .* is free now\. Give") as caught:
        RUNS[run](engine, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is left of an export"
    assert engine.resident.state is State.EMPTY
    assert (
        engine.generate(PROMPT, sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False).token_ids == before
    )


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("shapes differ"), OSError(errno.EIO, "input/output"), ValueError("out of memory")):
        with pytest.raises(type(error)) as caught, planned("cpu"):
            raise error
        assert caught.value is error


def test_what_torch_and_the_system_say() -> None:
    for ask in (too_much, lambda: mmap.mmap(-1, TOO_MUCH)):  # a tensor; an arena
        with pytest.raises((RuntimeError, OSError), match="Cannot allocate memory") as caught:
            ask()
        assert is_out_of_memory(caught.value)
    for words in ("CUDA error: out of memory", "MPS backend out of memory", "cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_error_holds_none_of_the_tensors() -> None:
    """They are freed while it is still being told, so that the next run finds the memory."""
    seen = []

    def work() -> None:
        large = torch.zeros(10)
        seen.append(weakref.ref(large))
        too_much()

    with pytest.raises(BudgetError) as caught, planned("cpu"):
        work()
    assert caught.value is not None
    assert seen[0]() is None
