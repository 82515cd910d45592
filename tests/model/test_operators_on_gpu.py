"""How many operators a recorded token takes, counted on an emulated card: on a GPU each takes microseconds."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from emulator import CARDS
from tiny import tiny_checkpoint, tiny_prompt

from griffin_offload import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARDS, reason="counted on an emulated card alone")]
BESIDES = 36  # the embedding, positions, the mask, the last norm and the lm_head


def operators(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Counter[str]:
    """Those of the last recording of an answer."""
    from emulator.graphs import CUDAGraph

    found: list[Counter[str]] = []
    end = CUDAGraph.capture_end

    def counted(self: CUDAGraph) -> None:
        found.append(Counter(self.operators))
        end(self)

    with monkeypatch.context() as patch:
        patch.setattr(CUDAGraph, "capture_end", counted)
        Engine(folder, device="cuda").generate(tiny_prompt(30), max_new_tokens=8, do_sample=False, **options)
    return found[-1]


@pytest.mark.parametrize(("kind", "most"), [("llama", 41), ("qwen3", 57), ("phi3", 38), ("gpt2", 29)])
@pytest.mark.parametrize("rest", ["drop", "int4"])
def test_a_layer_takes_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int, rest: str) -> None:
    two, three = (
        operators(
            tiny_checkpoint(tmp_path / str(layers), kind, dtype=torch.bfloat16, num_hidden_layers=layers),
            monkeypatch,
            sparsity=0.5,
            rest=rest,
        )
        for layers in (2, 3)
    )
    layer = three - two
    rest_in_int4 = 6 if rest == "int4" else 0  # three products, two parts joined, one sum
    assert layer.total() <= most + rest_in_int4, layer
    assert two.total() - 2 * layer.total() <= BESIDES, two
