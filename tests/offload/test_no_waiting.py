"""Between its layers a prompt pass asks a GPU for no number: the host would wait for the bus.

The device is torch's `meta`, which refuses to give one. What depends on no layer is looked up once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from engines import copying
from tiny import tiny_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from griffin_offload.model.modules import by_expert
from griffin_offload.offload import gather, resident_model
from griffin_offload.offload.layer_stream import LayerStream
from griffin_offload.offload.resident_model import ResidentModel
from griffin_offload.options import Pruning
from griffin_offload.pruning import fold
from griffin_offload.pruning.selection import Selection
from griffin_offload.quant import int4, weight

TOKENS = 24
ONCE = 2  # which tokens count for the fold: they are found, and (here, from the CPU) copied to the device
LOOKS = {torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


class Looks(TorchDispatchMode):
    """Counts operations that a host waits for, on any device, and copies of tensors between host and device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        self.count += func in LOOKS or len(devices) > 1
        return out


@pytest.fixture
def on_grid(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each look at whether numbers had 4 bits before."""
    seen: list[bool] = []
    monkeypatch.setattr(int4, "lie_on_grid", lambda *_: seen.append(False) or False)
    return seen


@pytest.fixture
def last_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked behind the last layer is left out, and so is which tokens count for the fold, asked before the
    first."""
    check = LayerStream.check
    monkeypatch.setattr(LayerStream, "check", lambda self, index, states: check(self, 0, states))
    monkeypatch.setattr(resident_model, "fold_tokens", lambda mask: fold.fold_tokens(torch.ones(mask.shape)))


def looks(folder: Any, rest: str, resident_dtype: str) -> int:
    """How often a pass over one prompt is waited for between its layers."""
    engine = copying(folder)
    pruning = Pruning(sparsity=0.5, rest=rest, resident_dtype=resident_dtype)
    plan = engine.plan(TOKENS, 4, pruning)
    assert plan.precision.quantized or (plan.prunes and plan.fold)
    engine.skeleton.to_device("meta")
    resident, reader = ResidentModel(engine.skeleton, "meta", copies=True), engine.opened.reader(plan)
    model = engine.skeleton.model
    width = model.get_input_embeddings().embedding_dim
    mask = torch.ones(1, TOKENS, dtype=torch.int64, device="meta")
    states = torch.empty(1, TOKENS, width, dtype=engine.skeleton.layout.dtype, device="meta")
    cache = replace(engine.opened, device="meta").kv_cache(plan)
    with resident.prepare(plan, Selection(), reader, None, mask), torch.no_grad(), Looks() as seen:
        model(inputs_embeds=states, past_key_values=cache, use_cache=True)
    return seen.count


@pytest.mark.usefixtures("last_of_all")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt", "gpt2", "falcon", "phi"])
def test_a_folded_prompt_is_waited_for_once_at_most(case: Callable[[str], Case], kind: str) -> None:
    assert looks(case(kind).folder, "drop", "bfloat16") <= ONCE


@pytest.mark.usefixtures("last_of_all")
@pytest.mark.parametrize(
    ("rest", "dtype", "each"), [("drop", "int8", 0), ("int4", "int8", 3), ("drop", "int4", 7), ("int4", "int4", 10)]
)
def test_formats_wait_only_once_for_a_matrix_in_int4(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, on_grid: list[bool], rest: str, dtype: str, each: int
) -> None:
    """`each`: of a layer's gate, up and down, once for its kept neurons and once for the others, and of attention."""
    monkeypatch.setattr(weight, "ON_GPU", 8)  # so that a matrix has several chunks
    folder = tiny_checkpoint(tmp_path / "m", "llama", intermediate_size=4096, num_hidden_layers=3)
    assert looks(folder, rest, dtype) <= (ONCE if rest == "drop" else 0)  # only what is dropped is folded
    assert len(on_grid) == 3 * each


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (50, 8), (50, 3)])
def test_places_of_all_experts_are_found_at_once(tokens: int, experts: int) -> None:
    index = torch.randint(-1, 9, (tokens, 2))  # some are no expert's
    with Looks() as seen:
        found = by_expert(index, experts)
    assert seen.count == 0, "one list of counts is asked for, and nothing else"
    assert len(found) == experts
    for expert, places in enumerate(found):
        assert torch.equal(places, (index.flatten() == expert).nonzero()[:, 0])


@pytest.mark.parametrize("shape", [(64,), (4, 64)])
def test_the_rest_is_found_without_a_look(shape: tuple[int, ...]) -> None:
    kept = torch.rand(shape).argsort(-1)[..., :24].sort().values
    mask = torch.ones(shape, dtype=torch.bool).scatter_(-1, kept, False)
    assert torch.equal(gather._places_unseen(mask, 40), gather._places(mask, 40))


def test_both_ways_to_solve_give_the_same() -> None:
    rows, right = torch.randn(40, 60, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    triangle = torch.linalg.cholesky(rows @ rows.T)
    torch.testing.assert_close(fold._solve_twice(triangle, right), torch.cholesky_inverse(triangle) @ right)
