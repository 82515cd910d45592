"""Matrices in parts, and side by side: each as if it were alone."""

from typing import Any

import pytest
import torch
from rounding import take

from griffin_offload.memory.arena import Arena
from griffin_offload.quant.formats import FORMATS
from griffin_offload.quant.joined import Part, Split, take_joined
from griffin_offload.quant.weight import CHUNK, Scratch


@pytest.mark.parametrize("halves", [False, True])
def test_a_split_is_the_whole(halves: bool) -> None:
    torch.manual_seed(0)
    up, down, x = torch.randn(40, 32), torch.randn(32, 40), torch.randn(5, 32)
    order = [*range(0, 12), *range(20, 32), *range(12, 20), *range(32, 40)] if halves else list(range(40))
    split = Split([take("", up[order][:24]), take("", up[order][24:])], [24, 16], down=False, halves=halves)
    torch.testing.assert_close(split.linear(x), x @ up.T)
    split = Split([take("", down[:, :24]), take("", down[:, 24:])], [24, 16], down=True)
    torch.testing.assert_close(split.linear(x @ up.T), x @ up.T @ down.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_joined_matrices_are_each_by_itself(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("griffin_offload.quant.onednn.LARGEST", 2 * CHUNK * 96)
    rows, matrices = [128, 704, 64], [torch.randn(count, 96).to(dtype) for count in (128, 704, 64)]
    arena = Arena(sum(FORMATS[name].bytes(count, 96, dtype.itemsize) for count in rows))
    parts = take_joined(name, arena, rows, 96, dtype)
    for number in (2, 0, 1):
        matrix = matrices[number]
        parts[number].fill(lambda begin, end, _, m=matrix: m[begin:end], Scratch(96, dtype.itemsize, "cpu"))
    alone = [take(name, matrix) for matrix in matrices]
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 96).to(dtype)
        for part, one in zip(parts, alone, strict=True):
            torch.testing.assert_close(part.linear(x), one.linear(x), rtol=0.01, atol=0.1)
    read = [sum(t.numel() * t.element_size() for t in part.tensors) for part in parts]
    assert read[0] > 0
    assert read[1:] == [0, 0]


def test_joined_matrices_are_multiplied_once_for_each_input() -> None:
    torch.manual_seed(0)
    parts: Any = take_joined("int8", Arena(2**16), [64, 64], 64, torch.float32)
    for part in parts:
        assert isinstance(part, Part)
        matrix = torch.randn(64, 64)
        part.fill(lambda begin, end, _, m=matrix: m[begin:end], Scratch(64, 4, "cpu"))
    whole = parts[0]._joined.weight
    calls: list[int] = []
    linear = whole.linear
    whole.linear = lambda x: calls.append(1) or linear(x)
    x = torch.randn(1, 64)
    first = [part.linear(x) for part in parts]
    assert len(calls) == 1
    assert parts[0]._joined._outs.get(x) is None  # nothing is kept when all have theirs
    torch.testing.assert_close(torch.cat(first, 1), linear(x))
    parts[0].linear(x)
    x.neg_()
    torch.testing.assert_close(parts[1].linear(x), -first[1])
    other = x.clone()
    torch.testing.assert_close(parts[0].linear(other), -first[0])
    assert len(calls) == 4
    with torch.inference_mode():
        other = x.clone()
        parts[0].linear(other)
        other.neg_()
        torch.testing.assert_close(parts[1].linear(other), first[1])


def test_rows_that_are_no_whole_blocks_are_not_joined() -> None:
    assert not any(isinstance(part, Part) for part in take_joined("int4", Arena(2**16), [64, 40], 64, torch.bfloat16))
