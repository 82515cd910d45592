"""What only a GPU can prove; skipped without CUDA. The same lines run on the CPU in test_engine.py, without streams."""

from pathlib import Path

import oracle
import pytest
import torch
from emulator import CARDS
from rings import LAYERS, seen_by_each_layer
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import NumericError
from griffin_offload.memory.upload import Ring
from griffin_offload.offload import layer_stream
from griffin_offload.units import KIB, MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt", "mixtral"])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_tokens_are_the_oracles(tmp_path: Path, kind: str, sparsity: float) -> None:
    folder, prompt = tiny_checkpoint(tmp_path / kind, kind), tiny_prompt()
    engine, model = Engine(folder, device="cuda", dtype="float32"), oracle.load(folder)
    expected, _ = oracle.masked_generate(model, prompt, oracle.experts(model, prompt, sparsity), 8)
    for _ in range(2):  # the second prompt pass reads only the neurons
        generation = engine.generate(prompt, sparsity=sparsity, method="griffin", max_new_tokens=8, do_sample=False)
        assert generation.token_ids == expected


def test_the_peak_is_the_allocators_and_below_the_plan(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes)
    report = (
        Engine(folder, device="cuda").generate(tiny_prompt(), sparsity=0.75, method="griffin", max_new_tokens=4).report
    )
    plan, context = report.plan, report.plan.rows[0].bytes
    assert context + 100 * MIB < report.measured_peak <= plan.peak < context + plan.full_bytes + 200 * MIB


def test_neither_slots_nor_pieces_are_overwritten_or_read_too_early() -> None:
    """The device still works on the last layer while four threads send the next ones."""
    seen, clock = seen_by_each_layer("cuda", 4 * MIB, 64 if CARDS else 4096)
    assert seen == [[layer + 1] * 2 for layer in range(LAYERS)]
    stages = clock.stages()
    assert stages
    assert stages.bus > 0
    assert stages.compute > 0


@pytest.mark.parametrize("threads", [1, 4, 12])
def test_several_readers_and_a_tiny_ring_give_the_oracles_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(layer_stream, "ring_for", lambda *_: Ring(threads, threads + 1, 16 * KIB))
    folder, prompt = tiny_checkpoint(tmp_path / "m", "llama"), tiny_prompt()
    engine, model = Engine(folder, device="cuda", dtype="float32"), oracle.load(folder)
    expected, _ = oracle.masked_generate(model, prompt, oracle.experts(model, prompt, 0.5), 8)
    for _ in range(3):
        assert (
            engine.generate(prompt, sparsity=0.5, method="griffin", max_new_tokens=8, do_sample=False).token_ids
            == expected
        )


def test_the_second_prompt_finds_its_layers_in_ram(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes)
    held, bare = Engine(folder, device="cuda", host_memory="2GiB"), Engine(folder, device="cuda", host_memory=0)
    answers = [
        [
            engine.generate(tiny_prompt(48, s), sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False)
            for s in range(2)
        ]
        for engine in (held, bare)
    ]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]
    first, second = (answer.report for answer in answers[0])
    neurons = 8 * 3 * 2 * 1024 * 8192
    assert second.bytes_read < 1e6 < neurons < first.bytes_read
    assert neurons <= second.measured_host <= second.plan.host_peak
    assert second.stages
    assert second.stages.read == 0 < second.stages.host_copy + second.locked_host  # copied by threads, or by the GPU
    assert answers[1][1].report.bytes_read > neurons


def test_layers_in_ram_are_page_locked_between_prompts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes)
    engine = Engine(folder, device="cuda", host_memory="2GiB")
    answers = []
    for _ in range(3):
        answers.append(
            engine.generate(tiny_prompt(48), sparsity=0.5, method="griffin", max_new_tokens=4, do_sample=False)
        )
        engine.resident.wait_for_locks()
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    report = answers[2].report
    assert report.locked_host >= 8 * 3 * 2 * 1024 * 8192, "the driver refuses to lock memory"
    assert report.stages
    assert report.stages.host_copy == report.stages.read == 0 < report.stages.bus
    engine.unload()
    assert engine.resident.locked_bytes == 0


def test_activations_that_are_not_finite_are_told_with_their_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.layers\.1"):
        Engine(folder, device="cuda", dtype="float16").generate(
            tiny_prompt(), sparsity=0.5, method="griffin", max_new_tokens=2
        )
