"""int8 by oneDNN: the layout against its own operator's, the products against exact sums, and where it is not used."""

import ctypes
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin_offload.memory.arena import Arena
from griffin_offload.quant import onednn as vnni
from griffin_offload.quant.formats import FORMATS, allocate_weight
from griffin_offload.quant.int8 import Int8, Int8OneDnn
from griffin_offload.quant.weight import Scratch

needs_vnni = pytest.mark.skipif(not vnni.is_fast(), reason="this processor has no AVX512-VNNI")
SHAPES = [(64, 64), (7, 40), (100, 50), (300, 129), (1000, 576)]


@pytest.fixture(autouse=True)
def no_kernel_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CPU", "none")


def filled(matrix: Tensor) -> Any:
    rows, columns = matrix.shape
    arena = Arena(FORMATS["int8"].bytes(rows, columns, 2))
    weight = allocate_weight("int8", arena, rows, columns, torch.bfloat16)
    weight.fill(lambda begin, end, _: matrix[begin:end], Scratch(columns, 2, "cpu"))
    return weight


def rounded(matrix: Tensor) -> Tensor:
    scales = matrix.float().abs().amax(1, keepdim=True) / 127
    return (matrix.float() * scales.reciprocal()).round() * scales


@needs_vnni
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_are_those_of_onednns_operator(shape: tuple[int, int]) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    theirs = torch.ops.onednn.qlinear_prepack(codes, None)
    size, address = torch.ops.mkldnn._nbytes(theirs), torch.ops.mkldnn.data_ptr(theirs)
    assert vnni.is_known(*shape)
    ours = vnni.Codes(torch.zeros(vnni.nbytes(*shape), dtype=torch.int8), *shape)
    for begin in range(0, shape[0], 128):
        part = codes[begin : begin + 128]
        ours.write(begin, part, part.sum(1, dtype=torch.int32))
    assert bytes(ours.memory.numpy()) == ctypes.string_at(address, size)
    assert torch.ops.mkldnn.data_ptr(ours.opaque) == ours.memory.data_ptr()
    assert torch.equal(ours.opaque.to_dense(), theirs.to_dense())


@needs_vnni
@pytest.mark.parametrize("tokens", [1, 2, vnni.TOKENS, vnni.TOKENS + 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_lose_nothing_but_the_weights_rounding(shape: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(shape).bfloat16(), torch.randn(tokens, shape[1])
    x[:, 3] = 800.0  # an outlier, as states have them: 8 bits would leave nothing of the others
    x = x.bfloat16()
    weight = filled(matrix)
    assert isinstance(weight, Int8OneDnn)
    exact = x.double() @ rounded(matrix).double().T
    step = 800 / vnni.LEVELS / 12**0.5  # of a state: its mean error
    noise = 5 * step * rounded(matrix).double().norm(dim=1)
    assert ((weight.linear(x).double() - exact).abs() < 0.005 * exact.abs() + noise).all()
    assert torch.equal(weight.linear(x[None]), weight.linear(x)[None])


@needs_vnni
def test_a_matrix_in_several_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(700, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    whole = filled(matrix).linear(x)
    monkeypatch.setattr(vnni, "LARGEST", 64 * 256)
    weight = filled(matrix)
    assert [len(piece.matrix) for piece in weight._codes] == [256, 256, 192]
    assert torch.equal(weight.linear(x), whole)
    assert sum(t.numel() * t.element_size() for t in weight.tensors) <= FORMATS["int8"].bytes(700, 64, 2)


@needs_vnni
def test_another_prompts_rows_take_the_place_of_the_first() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 128, 96).bfloat16()
    weight, x = filled(first), torch.randn(1, 96).bfloat16()
    memory = weight._codes[0].memory.data_ptr()
    weight.fill(lambda begin, end, _: second[begin:end], Scratch(96, 2, "cpu"))
    assert weight._codes[0].memory.data_ptr() == memory
    assert torch.equal(weight.linear(x), filled(second).linear(x))


@needs_vnni
def test_a_token_is_turned_into_bytes_once_and_never_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    in_bytes = vnni.in_bytes
    monkeypatch.setattr(vnni, "in_bytes", lambda x: calls.append(1) or in_bytes(x))
    torch.manual_seed(0)
    matrix, x = torch.randn(64, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    one, other = filled(matrix), filled(-matrix)
    out = one.linear(x)
    assert torch.equal(other.linear(x), -out)
    assert len(calls) == 1
    x.neg_()
    torch.testing.assert_close(one.linear(x), -out, rtol=0.01, atol=0.1)
    assert len(calls) == 2
    with torch.inference_mode():
        x = x.clone()
        torch.testing.assert_close(one.linear(x), -out, rtol=0.01, atol=0.1)
        x.neg_()
        torch.testing.assert_close(one.linear(x), out, rtol=0.01, atol=0.1)


@needs_vnni
def test_what_is_not_finite_stays_so_and_zeros_stay_zeros() -> None:
    weight = filled(torch.randn(64, 64).bfloat16())
    for value in (torch.nan, torch.inf):
        x = torch.ones(1, 64).bfloat16()
        x[0, 5] = value
        assert not weight.linear(x).isfinite().any()
    assert not weight.linear(torch.zeros(1, 64).bfloat16()).any()


@needs_vnni
def test_a_layout_that_is_not_onednns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = vnni._words
    monkeypatch.setattr(vnni, "_words", lambda codes: words(codes.flip(0)))
    assert not vnni.is_known(192, 128)
    forget()  # what was found so is not true
    monkeypatch.undo()
    assert vnni.is_known(192, 128)
    forget()
    monkeypatch.setattr(vnni, "_torch", lambda: None)  # a build of torch that makes no tensors of oneDNN's
    assert not vnni.is_known(192, 128)
    forget()


def forget() -> None:
    vnni._descriptor.cache_clear()
    vnni.is_known.cache_clear()


@needs_vnni
def test_a_trial_leaves_no_memory_behind() -> None:
    """In a heap with holes, as reading a model leaves it."""
    code = """
import torch
from griffin_offload.quant import onednn as vnni
from griffin_offload.memory.heap import return_freed_memory
from griffin_offload.memory.measure import resident_set
from griffin_offload.units import MIB

vnni.is_known(64, 64)  # oneDNN's code
blocks = [bytearray(100_000) for _ in range(800)]
last = [bytearray(100_000) for _ in range(9)]
del blocks
return_freed_memory()
before = resident_set()
assert vnni.is_known(2**14, 1024)
print((resident_set() - before) / MIB)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 4


def test_elsewhere_torchs_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(64, 96).bfloat16(), torch.randn(1, 96).bfloat16()
    usual = filled(matrix).linear(x)
    monkeypatch.setattr(vnni, "is_fast", lambda: False)
    weight = filled(matrix)
    assert isinstance(weight, Int8)
    torch.testing.assert_close(weight.linear(x), usual, rtol=0.02, atol=0.1)
    monkeypatch.undo()
    monkeypatch.setattr(vnni, "is_known", lambda rows, columns: False)
    assert isinstance(filled(matrix), Int8)
