"""Layers that stay in RAM between prompts: the same answers, less to read, within the budget."""

import gc
from pathlib import Path

import pytest
from engines import assert_equals_oracle, copying
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import OptionError
from griffin_offload.memory.host_cache import spread
from griffin_offload.units import MIB

SIZES = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8}
LAYER = 3 * 4 * 256 * 2048  # bytes of one feed-forward block in float32


@pytest.mark.parametrize("engine", [Engine, copying])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_later_prompts_get_the_oracles_answers(tmp_path: Path, engine: type[Engine], kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    held = engine(folder, host_memory="1GiB")
    for seed, sparsity in [(0, 0.5), (1, 0.5), (2, 0.9), (3, 0.5)]:
        assert_equals_oracle(folder, tiny_prompt(40, seed), sparsity, held, tokens=4)


@pytest.mark.parametrize("engine", [Engine, copying])
@pytest.mark.parametrize("layers", [0, 3, 8])
def test_the_next_prompt_reads_only_what_is_not_held(tmp_path: Path, engine: type[Engine], layers: int) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", **SIZES)
    held = engine(folder, host_memory=layers * (LAYER + 3 * 4096) + 100)
    reports = [
        held.generate(tiny_prompt(40, seed), sparsity=0.5, method="griffin", max_new_tokens=2).report
        for seed in range(3)
    ]
    assert [report.plan.held_layers for report in reports] == [layers] * 3
    first, second, third = (report.bytes_read for report in reports)
    assert first > 8 * LAYER
    assert [second, third] == pytest.approx([(8 - layers) * LAYER] * 2, abs=100_000)
    held.unload()
    assert (
        held.generate(tiny_prompt(40), sparsity=0.5, method="griffin", max_new_tokens=2).report.bytes_read > 8 * LAYER
    )


def test_a_batch_with_an_expert_set_for_each_prompt_finds_them_too(tmp_path: Path) -> None:
    held = Engine(tiny_checkpoint(tmp_path / "m", "llama", **SIZES), host_memory="1GiB")
    prompts = [tiny_prompt(20, seed) for seed in range(2)]
    reports = [
        held.generate_batch(prompts, per_prompt=True, sparsity=0.5, method="griffin", max_new_tokens=2)[0].report
        for _ in "ab"
    ]
    assert reports[1].bytes_read < reports[0].bytes_read - 7.9 * LAYER


def test_on_the_cpu_it_is_part_of_the_budget(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", **SIZES)
    free = Engine(folder)
    peak = free.plan(40, 2, sparsity=0.5, method="griffin").peak
    tight = Engine(folder, device_memory=peak + 4 * LAYER, host_memory="1GiB")
    plan = tight.plan(40, 2, sparsity=0.5, method="griffin")
    assert plan.fits
    assert 2 <= plan.held_layers <= 4
    assert plan.peak - plan.host_bytes == pytest.approx(peak, abs=2 * MIB)  # the process is not quite the same size
    report = tight.generate(tiny_prompt(40), sparsity=0.5, method="griffin", max_new_tokens=2).report
    assert report.measured_peak <= report.plan.peak <= tight.budget
    assert Engine(folder, host_memory="1GiB").plan(40, 2, sparsity=0.0).held_layers == 0  # nothing is read again


def test_a_longer_prompt_lets_layers_go(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", max_position_embeddings=2048, **SIZES)
    gc.collect()  # the engine of the last test may still be there, and would count as what the process holds anyhow
    peak = Engine(folder).plan(40, 2, sparsity=0.5, method="griffin").peak
    tight = Engine(folder, device_memory=peak + 6 * LAYER, host_memory="1GiB")
    held = []
    for tokens in (40, 600, 40):
        report = tight.generate(tiny_prompt(tokens), sparsity=0.5, method="griffin", max_new_tokens=2).report
        held.append(report.plan.held_layers)
        assert report.measured_peak <= report.plan.peak <= tight.budget
    assert held[0] == held[2] > held[1]


def test_what_is_more_than_the_ram_is_refused_where_a_gpu_has_its_own(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="of RAM is free"):
        copying(tiny_checkpoint(tmp_path / "m", "llama"), host_memory="100TiB")


def test_every_beginning_of_the_order_lies_evenly() -> None:
    for total in (1, 7, 28, 80):
        order = spread(total)
        assert sorted(order) == list(range(total))
        for count in range(2, total + 1):
            chosen = sorted(order[:count])
            gaps = [b - a for a, b in zip(chosen, [*chosen[1:], total], strict=True)]
            assert max(gaps) <= 4 * total / count
