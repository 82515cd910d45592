"""The dtype that a model computes in on a GPU; test_quantized.py tests the others."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.memory.cuda import multiplies_bfloat16
from griffin_offload.model import compute_dtype as module
from griffin_offload.model.compute_dtype import TOLD_ON_GPU, compute_dtype
from griffin_offload.model.pretrained import read_headers


def test_bfloat16_becomes_float16_where_a_gpu_has_no_products_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_headers(tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)).checkpoint
    for has_products, found in ((True, (torch.bfloat16, [])), (False, (torch.float16, [TOLD_ON_GPU]))):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda _, answer=has_products: answer)
        assert compute_dtype(checkpoint, "cuda") == found
        assert compute_dtype(checkpoint, "cuda", "bfloat16") == (torch.bfloat16, [])
    assert multiplies_bfloat16("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_an_answer_on_a_gpu_before_ampere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)
    engine = Engine(folder, device="cuda")
    report = engine.generate(tiny_prompt(20), sparsity=0.5, max_new_tokens=4, do_sample=False).report
    assert engine.opened.skeleton.layout.dtype == torch.float16
    assert report.overridden == (TOLD_ON_GPU,)
    assert report.measured_peak <= report.plan.peak
