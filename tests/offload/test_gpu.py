"""What only a GPU can prove; skipped without CUDA. The same lines run on the CPU in test_engine.py, without streams."""

from pathlib import Path

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine
from griffin_offload.errors import NumericError
from griffin_offload.memory.upload import Upload
from griffin_offload.units import MIB

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
        generation = engine.generate(prompt, sparsity=sparsity, max_new_tokens=8, do_sample=False)
        assert generation.token_ids == expected


def test_the_peak_is_the_allocators_and_below_the_plan(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    folder = tiny_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes)
    report = Engine(folder, device="cuda").generate(tiny_prompt(), sparsity=0.75, max_new_tokens=4).report
    assert 100 * MIB < report.measured_peak <= report.plan.peak < report.plan.full_bytes + 200 * MIB


def test_a_slot_is_neither_overwritten_nor_read_too_early() -> None:
    """The device still works on the last layer while the next ones come: more copies than slots, long products."""
    size, slots, layers = 32 * MIB, 2, 20
    upload, seen = Upload(size, slots, "cuda"), []
    heavy = torch.randn(4096, 4096, device="cuda")
    for layer in range(layers):
        slot = layer % slots
        upload.begin(slot)
        upload.host[slot].memory.fill_(layer + 1)
        upload.send(slot, size)
        upload.arrive(slot)
        heavy = (heavy @ heavy).clamp_(-1, 1)
        part = upload.there[slot].memory[:size]
        seen.append(torch.stack([part.min(), part.max()]))
        upload.leave(slot)
    assert [pair.tolist() for pair in seen] == [[layer + 1] * 2 for layer in range(layers)]


def test_activations_that_are_not_finite_are_told_with_their_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.layers\.1"):
        Engine(folder, device="cuda", dtype="float16").generate(tiny_prompt(), sparsity=0.5, max_new_tokens=2)
