"""Our own C++ kernels, by every set of instructions that this processor has, against exact products."""

import subprocess
import sys
import threading

import pytest
import torch
from kernels import HERE, needs_library, pack
from rounding import ERROR as FORMAT_ERROR
from rounding import take
from torch import Tensor

from griffin_offload.errors import OptionError
from griffin_offload.native import library, products
from griffin_offload.native.products import Products
from griffin_offload.quant import onednn
from griffin_offload.quant.formats import kernel

SHAPES = [(16, 32), (7, 40), (1, 1), (100, 50), (33, 2080), (5, 8200)]
TOKENS = [1, 2, 3, 4, 7, 70]
ERROR = {"int8": 1e-4, "int4": 0.02}  # of tokens in 16 bits, and in 8 bits by 32 columns


def random_int8(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows).to(dtype)
    return codes, scales, codes.double() * scales.double()[:, None]


def random_int4(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and pairs of scale and zero in the kernel's layout; the matrix. What pads it is not zero."""
    blocks, groups = -(-rows // 16), -(-columns // 32)
    codes = torch.randint(16, (16 * blocks, 32 * groups), dtype=torch.uint8)
    pairs = torch.randn(16 * blocks, groups, 2).bfloat16()
    scales, zeros = pairs.double().repeat_interleave(32, 1).unbind(2)
    matrix = (codes.double() - 8) * scales + zeros
    return pack(codes), pairs.view(blocks, 16, groups, 2).transpose(1, 2).contiguous(), matrix[:rows, :columns]


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HERE)
def test_products_are_exact_but_for_the_tokens_rounding(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for dtype in products.DTYPES:
        made = {"int8": random_int8(*shape, dtype), "int4": random_int4(*shape)}
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1] + 3)
            x[:, 2::29] *= 300  # outliers, as states have them
            x = x.to(dtype)[:, 3:]  # rows that lie apart
            for format, (codes, scales, matrix) in made.items():
                out = Products(codes, scales, *shape, name).multiply(x)
                assert out.shape == (tokens, shape[0])
                assert out.dtype == dtype
                size = x.double().norm(dim=1)[:, None] * matrix.norm(dim=1)  # a sum may be near zero
                bound = ERROR[format] * size + torch.finfo(dtype).eps * out.double().abs()
                assert ((out.double() - x.double() @ matrix.T).abs() <= bound).all(), (format, tokens)


@needs_library
def test_every_set_of_instructions_finds_the_same() -> None:
    """The largest codes and tokens too: no sum overflows."""
    columns = 9000
    x = torch.cat([torch.randn(2, columns), torch.ones(2, columns)])
    ones, scales = torch.full((6, columns), 127, dtype=torch.int8), torch.ones(6)
    codes, pairs, _ = random_int4(48, columns)
    full = torch.full_like(codes, 255)
    for matrix in ((ones, scales, 6), (codes, pairs, 48), (full, pairs, 48)):
        outs = [Products(*matrix, columns, name).multiply(x) for name in HERE]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(
        Products(ones, scales, 6, columns, HERE[0]).multiply(x)[2:], torch.full((2, 6), 127e0 * columns)
    )


@needs_library
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", products.DTYPES)
def test_tokens_of_nan_and_infinity_give_nan_and_zeros_zero(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 96).to(dtype)
    x[0, 95], x[1, 40], x[2] = float("nan"), -float("inf"), 0
    for codes, scales, _ in (random_int8(20, 96, dtype), random_int4(20, 96)):
        out = Products(codes, scales, 20, 96, name).multiply(x)
        assert out[:2].isnan().all()
        assert torch.equal(out[2], torch.zeros(20, dtype=dtype))
        assert out[3].isfinite().all()


@needs_library
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_threads_and_callers_at_once_change_nothing(tokens: int) -> None:
    codes, scales, _ = random_int4(3000, 512)
    products, x = Products(codes, scales, 3000, 512, HERE[0]), torch.randn(tokens, 512)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs.append(products.multiply(x))
            callers = [threading.Thread(target=lambda: outs.append(products.multiply(x))) for _ in range(3)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
    finally:
        torch.set_num_threads(before)
    assert len(outs) == 8
    assert all(torch.equal(out, outs[0]) for out in outs)


@needs_library
def test_no_tokens_and_no_rows() -> None:
    codes, scales, _ = random_int8(4, 8, torch.float32)
    assert Products(codes, scales, 4, 8, HERE[0]).multiply(torch.ones(0, 8)).shape == (0, 4)
    assert Products(codes[:0], scales[:0], 0, 8, HERE[0]).multiply(torch.ones(3, 8)).shape == (3, 0)


@pytest.mark.skipif(products.WORDS_BY not in HERE or not onednn.is_fast(), reason="this processor has no AVX512-VNNI")
@pytest.mark.parametrize("shape", [(64, 64), (7, 40), (300, 129), (1000, 576)])
def test_onednns_layout_gives_the_same(shape: tuple[int, int]) -> None:
    codes, scales, matrix = random_int8(*shape, torch.float32)
    there = onednn.Codes(torch.zeros(onednn.nbytes(*shape), dtype=torch.int8), *shape)
    there.write(0, codes, codes.sum(1, dtype=torch.int32))
    for tokens in (1, 2, 3, 8):
        x = torch.randn(tokens, shape[1])
        x[:, 3] = 800.0
        out = Products(there.memory, scales, *shape, products.WORDS_BY).multiply(x).double()
        exact = x.double() @ matrix.T
        assert (out - exact).norm() < 1e-3 * exact.norm()  # 8 bits would leave nothing of the others


@needs_library
@pytest.mark.parametrize("name", [name for name in HERE if name != "plain"])
@pytest.mark.parametrize("shape", [(48, 96), (100, 50), (520, 288)])
def test_formats_take_the_instructions_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, int]
) -> None:
    """GRIFFIN_CPU. int8 in rows too, where oneDNN would be quick."""
    monkeypatch.setenv("GRIFFIN_CPU", name)
    monkeypatch.setattr(onednn, "is_fast", lambda: False)
    torch.manual_seed(0)
    matrix = torch.randn(shape).bfloat16()
    for format in ("int8", "int4"):
        weight = take(format, matrix)
        assert weight.kernel == "own C++ kernel"
        for tokens in (1, 3, 70):
            x = torch.randn(tokens, shape[1]).bfloat16()
            exact = x.float() @ matrix.float().T
            assert (weight.linear(x).float() - exact).norm() < FORMAT_ERROR[format] * exact.norm()


@pytest.mark.parametrize("asked", ["no library", "other instructions"])
def test_without_the_library_other_kernels_do_its_work(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    if asked == "no library":
        monkeypatch.setattr(library, "library", lambda: None)
        library.instructions.cache_clear()
    else:
        monkeypatch.setenv("GRIFFIN_CPU", "nothing of the kind")
    others = ["oneDNN" if onednn.is_fast() else "torch kernel", "torch kernel"]
    try:
        assert [kernel(name, "cpu", torch.bfloat16) for name in ("int8", "int4")] == others
    finally:
        library.instructions.cache_clear()


@needs_library
def test_threads_are_torchs() -> None:
    """A second pool would fight with torch's for the cores."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import os, torch; from griffin_offload.native.products import *;"
        "torch.set_num_threads(2); torch.ones(10**6).mul(2); before = len(os.listdir('/proc/self/task'));"
        "p = Products(torch.ones(4096, 512, dtype=torch.int8), torch.ones(4096), 4096, 512, 'plain');"
        "p.multiply(torch.ones(1, 512)); print(before, len(os.listdir('/proc/self/task')))"
    )
    before, after = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()
    assert before == after


@needs_library
def test_instructions_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CPU", "nonsense")
    with pytest.raises(OptionError, match=f"no kernels 'nonsense' here; there are: {', '.join(HERE)}, none"):
        library.check_asked()
    for name in ("", "none", *HERE):
        monkeypatch.setenv("GRIFFIN_CPU", name)
        library.check_asked()
