"""Queries and keys of a token rotated by one kernel, in answers on a GPU; test_rotary_kernel.py tests the kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from tiny import tiny_prompt

from griffin_offload import Engine
from griffin_offload.model import rotary_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sequences", [1, 3])
def test_recorded_tokens_are_those_without_the_kernel(
    case: Callable[[str], Case], dtype: torch.dtype, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = rotary_kernel.kernel_on, list[torch.Tensor]()

    def counted(device: torch.device, of: torch.dtype) -> Any:
        kernel = own(device, of)
        assert kernel, f"no kernel rotates {of} on {device}"

        def rotated(q: torch.Tensor, *more: torch.Tensor) -> Any:
            calls.append(q)
            return kernel(q, *more)

        return rotated

    prompts = [tiny_prompt(20 + n, n) for n in range(sequences)]

    def tokens() -> list[list[int]]:
        engine = Engine(case("llama").folder, device="cuda", dtype=str(dtype).removeprefix("torch."))
        made = engine.generate_batch(prompts, sparsity=0.5, method="griffin", max_new_tokens=12, do_sample=False)
        assert made[0].report.steps.recordings
        return [answer.token_ids for answer in made]

    monkeypatch.setattr(rotary_kernel, "kernel_on", lambda *_: None)
    expected = tokens()
    monkeypatch.setattr(rotary_kernel, "kernel_on", counted)
    assert tokens() == expected
    assert {(len(q), q.shape[2]) for q in calls} == {(sequences, 1)}
