"""A type in no table: its structure is found by shape, and tried before it is believed."""

from pathlib import Path

import pytest
from tiny import tiny_checkpoint, tiny_prompt
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from griffin_offload import Engine
from griffin_offload.errors import UnsupportedArchitecture
from griffin_offload.model.architecture import ARCHITECTURES, Architecture, FeedForward
from griffin_offload.model.refused import REFUSED
from griffin_offload.offload.probe import probe

PROMPT, NEW = tiny_prompt(), 12


def greedy(engine: Engine, prompt: list[int], sparsity: float) -> list[int]:
    return engine.generate(prompt, sparsity=sparsity, method="griffin", max_new_tokens=NEW, do_sample=False).token_ids


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "opt", "gemma2", "starcoder2", "falcon"])
def test_a_type_in_no_table_is_probed_and_runs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    expected = greedy(Engine(folder), PROMPT, 0.5)
    monkeypatch.delitem(ARCHITECTURES, kind)
    assert greedy(Engine(folder), PROMPT, 0.5) == expected


def test_a_wrong_structure_fails_the_probe(tmp_path: Path) -> None:
    """Up's rows without gate's; and a matrix that is not the whole of what z is made of."""
    config = Engine(tiny_checkpoint(tmp_path / "m", "phi3")).opened.config
    halves = FeedForward(("mlp.gate_up_proj",), "mlp.down_proj", halves=False)
    with pytest.raises(UnsupportedArchitecture, match="phi3"):
        probe(config, Architecture("model.layers", {halves: ""}))


def test_what_is_not_found_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "bitnet")  # found, but a norm over all neurons fails the probe
    monkeypatch.delitem(REFUSED, "bitnet")
    with pytest.raises(UnsupportedArchitecture, match=r"bitnet.*tiny"):
        Engine(folder)
    assert "bitnet" in CONFIG_MAPPING_NAMES
