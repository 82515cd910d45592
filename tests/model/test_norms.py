"""RMS norms by our own kernel, against transformers' own modules."""

from collections.abc import Callable

import pytest
import torch
from cases import Case
from engines import copying
from kernels import needs_library
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from griffin_offload import Engine
from griffin_offload.model.norms import is_fused


def norms(engine: Engine) -> dict[str, tuple[torch.nn.Module, bool]]:
    """By name, with whether our kernel took its place."""
    named = engine.skeleton.model.named_modules()
    return {n: (m, "forward" in vars(m)) for n, m in named if type(m).__name__.endswith("RMSNorm")}


@needs_library
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "olmo2"])
def test_every_norm_of_these_is_ours_and_gives_the_same(case: Callable[[str], Case], kind: str) -> None:
    found = norms(Engine(case(kind).folder))
    assert found
    for name, (module, ours) in found.items():
        assert ours, name
        weight = torch.randn(module.weight.shape).bfloat16()
        x = torch.randn(1, 3, len(weight)).bfloat16()
        values = {"weight": weight}
        with torch.no_grad():
            out = torch.func.functional_call(module, values, (x,))
            module.__dict__.pop("forward")
            expected = torch.func.functional_call(module, values, (x,))
        assert (out != expected).float().mean() < 0.02
        torch.testing.assert_close(out, expected, rtol=0.016, atol=1e-6)


def test_without_the_library_the_modules_own_stay(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CPU", "none")
    assert not any(ours for _, ours in norms(Engine(case("llama").folder)).values())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "olmo2", "phi3", "granite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_beside_a_gpu_every_norm_is_one_operator_of_torchs_and_gives_the_same_bits(
    case: Callable[[str], Case], kind: str, dtype: torch.dtype
) -> None:
    found = norms(copying(case(kind).folder, dtype=str(dtype).removeprefix("torch.")))
    assert found
    for name, (module, _) in found.items():
        ours = module.__dict__.pop("forward")
        assert is_fused(ours), name
        for scale in (0.01, 1.0, 100.0):
            weight = torch.randn(module.weight.shape).to(dtype)
            module.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
            x = (scale * torch.randn(2, 3, len(weight))).to(dtype)
            assert torch.equal(ours(x), module(x))


def test_a_norm_that_computes_something_else_stays_as_it_is(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x.sigmoid())
    assert not any(changed for _, changed in norms(copying(case("llama").folder)).values())
