"""The RMS norm of our own kernel, by every set of instructions that this processor has, against the formula."""

import pytest
import torch
from kernels import HERE, needs_library

from griffin_offload.native.norm import WAYS, rms_norm, way_of

WAYS_BY_TORCH = [
    lambda x, weight, per: (x * per).bfloat16() * weight,
    lambda x, weight, per: (x * per * (1 + weight.float())).bfloat16(),
    lambda x, weight, per: (x * per * weight.float()).bfloat16(),
]


def by_torch(x: torch.Tensor, weight: torch.Tensor, way: int, eps: float = 1e-6) -> torch.Tensor:
    numbers = x.float()
    return WAYS_BY_TORCH[way](numbers, weight, torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + eps))


@needs_library
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("way", range(WAYS))
def test_norms_are_those_of_the_formula(name: str, way: int) -> None:
    torch.manual_seed(0)
    for shape in ((1, 1, 64), (3, 100), (2, 5, 7), (1, 2048)):
        x, weight = (100 * torch.randn(shape)).bfloat16(), torch.randn(shape[-1]).bfloat16()
        out, expected = rms_norm(x, weight, 1e-6, way, name), by_torch(x, weight, way)
        assert out.shape == x.shape
        torch.testing.assert_close(out, expected, rtol=0.008, atol=0)  # a rounding
        assert (out != expected).float().mean() < 0.02
    zeros = torch.zeros(2, 64).bfloat16()
    assert torch.equal(rms_norm(zeros, weight[:64], 1e-6, way, name), zeros)


@needs_library
def test_the_way_is_found_and_what_is_none_of_them_is_left() -> None:
    for way in range(WAYS):
        assert way_of(lambda x, weight, way=way: by_torch(x, weight, way), 96, 1e-6) == way
    assert way_of(lambda x, weight: by_torch(x, weight, 0, eps=1.0), 96, 1e-6) is None
    assert way_of(lambda x, weight: x * weight, 96, 1e-6) is None
    assert way_of(lambda x, weight: by_torch(x, weight, 0).float(), 96, 1e-6) is None
