"""The rotation of a token's queries and keys in one kernel: on a GPU if there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying
from tiny import tiny_prompt
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from griffin_offload.model import rotary_kernel as hook
from griffin_offload.model.rotary_kernel import NAME, Rotation, common, kernel_on, rotate_by_one_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As in quant/test_triton.py.
OLDEST = "3.6" if DEVICE == "cuda" else "3.7"
pytest.importorskip("triton", OLDEST, reason="Triton is not installed (it comes with torch for CUDA), or is too old")

from griffin_offload.model import triton_rotary  # noqa: E402

OWN = modeling_llama.apply_rotary_pos_emb


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The kernel takes tensors of the CPU, as it does a GPU's; what it took. The file is as it was afterwards."""
    taken: list[torch.Tensor] = []

    def rotate(q: torch.Tensor, *more: torch.Tensor) -> Any:
        taken.append(q)
        return triton_rotary.rotate(q, *more)

    monkeypatch.setattr(hook, "kernel_on", lambda device, dtype: rotate)
    monkeypatch.setattr(modeling_llama, NAME, OWN)
    return taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("sequences", "heads", "groups", "size", "rows"), [(1, 4, 4, 64, 1), (3, 6, 2, 80, 3)])
def test_the_kernel_gives_what_the_file_does(
    dtype: torch.dtype, sequences: int, heads: int, groups: int, size: int, rows: int
) -> None:
    torch.manual_seed(0)
    q, k = (
        torch.randn(sequences, 1, count, size, device=DEVICE).to(dtype).transpose(1, 2) for count in (heads, groups)
    )
    cos, sin = (torch.randn(rows, 1, size, device=DEVICE).to(dtype) for _ in range(2))
    found, expected = triton_rotary.rotate(q, k, cos, sin), OWN(q, k, cos, sin)
    for one, other in zip(found, expected, strict=True):
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts bits off, where a GPU rounds
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)
        else:
            assert torch.equal(one, other)


def test_tokens_of_a_model_whose_file_takes_the_kernel_are_its_own(
    case: Callable[[str], Case], on_the_cpu: list[torch.Tensor]
) -> None:
    """One launch for each layer of a token; the prompt is the file's own. A compiled layer is, too."""
    expected, _ = case("llama").answer(tiny_prompt(), 0.5, 4)
    engine = copying(case("llama").folder)
    rotate_by_one_kernel(engine.skeleton.modules[0])
    assert isinstance(getattr(modeling_llama, NAME), Rotation)
    rotate_by_one_kernel(engine.skeleton.modules[0])
    assert getattr(modeling_llama, NAME).own is OWN
    answer = engine.generate(tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False)
    assert answer.token_ids == expected
    assert len(on_the_cpu) == 3 * len(engine.skeleton.modules)
    assert {q.shape[2] for q in on_the_cpu} == {1}


def test_what_the_kernel_does_not_take_is_left_to_the_file(on_the_cpu: list[torch.Tensor]) -> None:
    rotation = Rotation(OWN)

    def given(tokens: int = 1, heads: int = 2, rows: int = 1, size: int = 8) -> list[torch.Tensor]:
        q, k = (torch.randn(2, count, tokens, 8) for count in (4, heads))
        return [q, k, *(torch.randn(rows, tokens, size) for _ in range(2))]

    for tensors in (given(tokens=3), [each.half() if i else each for i, each in enumerate(given())]):
        for one, other in zip(rotation(*tensors), OWN(*tensors), strict=True):
            assert torch.equal(one, other)
    q, k, cos, sin = given()
    flipped = [q.transpose(1, 2), k.transpose(1, 2), cos, sin]
    assert torch.equal(rotation(*flipped, unsqueeze_dim=2)[0], OWN(*flipped, unsqueeze_dim=2)[0])
    assert not on_the_cpu
    rotation(*given())
    assert len(on_the_cpu) == 1


def test_only_the_common_function_is_replaced(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_cohere.apply_rotary_pos_emb
    rotate_by_one_kernel(copying(case("cohere").folder).skeleton.modules[0])  # pairs are neighbours there
    assert modeling_cohere.apply_rotary_pos_emb is own
    monkeypatch.setattr(modeling_llama, NAME, lambda q, k, cos, sin: common(q, k, cos, -sin))
    rotate_by_one_kernel(copying(case("llama").folder).skeleton.modules[0])
    assert not isinstance(getattr(modeling_llama, NAME), Rotation)


@pytest.mark.parametrize("fault", ["it rounds in another way", "there is no C compiler"])
def test_a_kernel_that_fails_its_trial_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def rotate(*given: torch.Tensor) -> Any:
        if "compiler" in fault:
            raise RuntimeError(fault)
        return tuple(each.nextafter(torch.tensor(9.0)) for each in common(*given))

    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)  # to a GPU
    monkeypatch.setattr(triton_rotary, "rotate", common)
    kernel_on.cache_clear()
    assert kernel_on(torch.device("cuda", 7), torch.float32)
    assert kernel_on(torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(triton_rotary, "rotate", rotate)
    kernel_on.cache_clear()
    assert kernel_on(torch.device("cuda", 7), torch.float32) is None
    kernel_on.cache_clear()


def test_the_kernel_compiles_for_gpus_and_rounds_as_torch_does(tmp_path: Path) -> None:
    """To the nearest, and without a fused product and sum. (The oldest GPUs with bfloat16 have no other operation.)"""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from griffin_offload.model.triton_rotary import _rotate

for target in (75, 80, 90, 120):
    for dtype in ("bf16", "fp16", "fp32"):
        types = [f"*{dtype}"] * 6 + ["i32"] * 8 + ["constexpr"] * 2
        signature = dict(zip(_rotate.arg_names, types, strict=True))
        source = triton.compiler.ASTSource(_rotate, signature, {"HALF": 64, "ROOM": 64})
        made = triton.compile(source, GPUTarget("cuda", target, 32), {"num_warps": 1, "enable_fp_fusion": False})
        assert made.asm["cubin"]
        ptx, name = made.asm["ptx"], {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[dtype]
        if dtype != "bf16" or target >= 90:
            assert f"mul.rn.{name}" in ptx and f"add.rn.{name}" in ptx and "fma." not in ptx, (target, dtype)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
