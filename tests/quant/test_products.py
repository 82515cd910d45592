"""Products of many tokens in half precision: both ways against float32, and the choice between them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from cases import Case
from engines import assert_equals_oracle, greedy
from tiny import tiny_checkpoint, tiny_prompt
from torch import nn
from transformers.pytorch_utils import Conv1D

from griffin_offload import Engine
from griffin_offload.memory import measured
from griffin_offload.memory.arena import Arena
from griffin_offload.model.modules import RoutedExperts, multiply_by_the_quicker_way
from griffin_offload.quant import products
from griffin_offload.quant.formats import allocate_weight
from griffin_offload.quant.products import TRIED, by_blocks, choose, dense_linear, fewest_tokens
from griffin_offload.quant.weight import Scratch

LARGE = products.LEAST
BLOCKS, TORCHS = {"torch": [2.0, 8.0], "blocks": [1.0, 2.0]}, {"torch": [1.0, 1.0], "blocks": [1.0, 1.0]}


@pytest.fixture(autouse=True)
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, int | None]:
    """No choice made yet, in this process or in the cache."""
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path))
    monkeypatch.setattr(products, "_fewest", {})
    return products._fewest


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[products.Seconds]:
    """What will be measured, in turn."""
    found = [BLOCKS]
    monkeypatch.setattr(products, "measure", lambda dtype: found.pop())
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weights that are multiplied by blocks."""
    found: list[int] = []
    monkeypatch.setattr(products, "by_blocks", lambda *args: found.append(len(args[1])) or by_blocks(*args))
    return found


def test_the_choice_follows_the_times() -> None:
    assert fewest_tokens(BLOCKS) == TRIED[0] // 2
    assert fewest_tokens({"torch": [1.0, 8.0], "blocks": [1.0, 2.0]}) == TRIED[1] // 2
    assert fewest_tokens({"torch": [4.0, 1.0], "blocks": [1.0, 1.0]}) is None
    assert fewest_tokens({"torch": [1.1, 1.1], "blocks": [1.0, 1.0]}) is None, "a busy machine measures as much"


def test_every_way_is_measured() -> None:
    seconds = products.measure(torch.bfloat16, 32, 32)
    assert [len(times) for times in seconds.values()] == [len(TRIED)] * 2
    assert all(0 < each < 10 for times in seconds.values() for each in times)


def test_only_a_large_model_in_half_precision_is_worth_a_measurement(
    tmp_path: Path, choices: dict[torch.dtype, int | None], measurements: list[products.Seconds]
) -> None:
    assert not choose(torch.bfloat16, LARGE - 1)
    assert not choose(torch.float32, LARGE)
    assert not choices
    assert not list(tmp_path.iterdir())
    assert choose(torch.bfloat16, LARGE)
    assert choices == {torch.bfloat16: 8}
    assert products.chosen(torch.bfloat16) == "float32 blocks from 8 tokens on"
    assert products.chosen(torch.float16) == "torch's own products"


def test_a_measurement_is_kept_and_after_a_day_the_best_counts(
    tmp_path: Path, measurements: list[products.Seconds]
) -> None:
    assert choose(torch.bfloat16, LARGE)
    assert choose(torch.bfloat16, LARGE), "read from the cache: there is no second measurement to take"
    file = tmp_path / "products.json"
    entries = json.loads(file.read_text())
    (entry,) = entries.values()
    entry["time"] = time.time() - measured.DAY - 1
    file.write_text(json.dumps(entries))
    measurements.append({"torch": [0.5, 9.0], "blocks": [3.0, 9.0]})
    assert products.measured(torch.bfloat16) == {"torch": [0.5, 8.0], "blocks": [1.0, 2.0]}


@pytest.mark.parametrize("seconds", [{}, {"torch": [1.0]}, {**BLOCKS, "torch": [0, 1]}, {**BLOCKS, "blocks": "x"}, 3])
def test_a_broken_entry_is_measured_anew(tmp_path: Path, measurements: list[products.Seconds], seconds: object) -> None:
    key = measured.machine_key("cpu", torch.bfloat16)
    (tmp_path / "products.json").write_text(json.dumps({key: {"time": time.time(), "seconds": seconds}}))
    assert products.measured(torch.bfloat16) == BLOCKS


def test_fewer_instructions_or_threads_are_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {measured.machine_key("cpu", torch.bfloat16), measured.machine_key("cpu", torch.float16)}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    keys.add(measured.machine_key("cpu", torch.bfloat16))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    keys.add(measured.machine_key("cpu", torch.bfloat16))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    keys.add(measured.machine_key("cpu", torch.bfloat16))
    assert len(keys) == 5


@pytest.mark.parametrize("dtype", products.HALVES)
@pytest.mark.parametrize("tokens", [(1,), (3,), (70,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (48, 40), (37, 65), (130, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_both_ways_are_the_product_in_float32(
    monkeypatch: pytest.MonkeyPatch,
    choices: dict[torch.dtype, int | None],
    dtype: torch.dtype,
    tokens: tuple[int, ...],
    rows: int,
    columns: int,
    bias: bool,
) -> None:
    """Also of strided tokens, and of a weight that is transposed or a part of another. Blocks do not divide rows."""
    monkeypatch.setattr(products, "BLOCK", 20 * columns)
    torch.manual_seed(0)
    x = torch.randn(*tokens, 2 * columns)[..., ::2].to(dtype)
    some = torch.randn(rows) if bias else None
    for weight in (
        torch.randn(rows, columns, dtype=dtype),
        torch.randn(columns, rows, dtype=dtype).t(),
        torch.randn(rows, 2 * columns, dtype=dtype)[:, columns:],
    ):
        low = None if some is None else some.to(dtype)
        exact = nn.functional.linear(x.float(), weight.float(), None if low is None else low.float())
        choices.clear()
        usual = dense_linear(x, weight, low)
        assert torch.equal(usual, nn.functional.linear(x, weight, low))
        choices[dtype] = 1
        found = dense_linear(x, weight, low)
        for out in (usual, found):
            assert out.shape == exact.shape
            assert out.dtype == dtype
            assert (out.float() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_fewer_tokens_and_other_dtypes_stay_torchs(
    monkeypatch: pytest.MonkeyPatch, choices: dict[torch.dtype, int | None]
) -> None:
    choices[torch.bfloat16] = 8
    monkeypatch.setattr(products, "by_blocks", lambda x, *_: seen.append(x))
    seen: list[torch.Tensor] = []
    weight = torch.ones(4, 6)
    for shape in ((7, 6), (1, 1, 6), (8, 6), (2, 4, 6)):
        dense_linear(torch.ones(shape, dtype=torch.bfloat16), weight.bfloat16())
    dense_linear(torch.ones(8, 6), weight)
    assert [tuple(x.shape) for x in seen] == [(8, 6), (2, 4, 6)]


@pytest.mark.parametrize("format", ["int8", "int4", ""])
@pytest.mark.parametrize("dtype", products.HALVES)
def test_quantized_weights_are_made_dense_in_float32(
    choices: dict[torch.dtype, int | None], format: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(192, 96).to(dtype), torch.randn(130, 96).to(dtype)
    weight = allocate_weight(format, Arena(2**17), *matrix.shape, dtype)
    weight.fill(lambda begin, end, scratch: matrix[begin:end], Scratch(96, 2, "cpu"))
    usual = weight.linear(x).float()
    for fewest in (None, 8):
        choices[dtype] = fewest
        found = weight.linear(x).float()
        assert (found - usual).norm() < 0.01 * usual.norm()


def test_modules_multiply_by_blocks(choices: dict[torch.dtype, int | None], seen: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Conv1D(5, 4), nn.Linear(5, 3, bias=False)).bfloat16()
    x = torch.randn(9, 6).bfloat16()
    expected = model(x)
    multiply_by_the_quicker_way(model)
    assert torch.equal(model(x), expected)
    choices[torch.bfloat16] = 8
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)
    assert seen == [4, 5, 3]


def test_transformers_own_experts_too(case: Callable[[str], Case], choices: dict[torch.dtype, int | None]) -> None:
    """As the floor of a benchmark needs them. In float32, where no rounding changes which experts are taken."""
    model = oracle.load(case("mixtral").folder)
    ids = torch.tensor([tiny_prompt(20)])
    with torch.no_grad():
        expected = model(ids).logits
        multiply_by_the_quicker_way(model)
        choices[torch.float32] = 1
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
    assert isinstance(model.model.layers[0].mlp.experts.forward, RoutedExperts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_run_by_blocks_equals_the_oracle(
    case: Callable[[str], Case],
    monkeypatch: pytest.MonkeyPatch,
    choices: dict[torch.dtype, int | None],
    seen: list[int],
    kind: str,
) -> None:
    """In float32, which blocks convert to itself."""
    choices[torch.float32] = 2
    assert_equals_oracle(case(kind).folder, tiny_prompt(20), 0.5, Engine(case(kind).folder), tokens=4)
    assert len(seen) > 8


def test_a_run_in_half_precision_differs_by_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: list[products.Seconds], seen: list[int]
) -> None:
    folder, prompt = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16), tiny_prompt(20)
    _, expected = greedy(Engine(folder), prompt, 0.5, 1)
    assert not seen
    monkeypatch.setattr(products, "LEAST", 0)
    _, logits = greedy(Engine(folder), prompt, 0.5, 1)
    assert len(seen) > 8
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.1)


def test_a_run_by_blocks_stays_inside_its_plan(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A width and a prompt that make the scratch count: blocks of 4 MiB, and the tokens in float32."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    folder = tiny_checkpoint(tmp_path / "wide", "llama", dtype=torch.bfloat16, **sizes)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "measure", lambda dtype: BLOCKS)
    report = Engine(folder).generate([5, 9, 3, 7] * 300, sparsity=0.5, method="griffin", max_new_tokens=2).report
    assert report.measured_peak <= report.plan.peak
