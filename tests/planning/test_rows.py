"""Rows of a plan (griffin_offload.planning.rows)."""

from pathlib import Path

from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.planning.plan import make_plan
from griffin_offload.planning.request import Request
from griffin_offload.planning.rows import KERNELS, SIZES
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import GIB


def test_layers_of_many_sizes_have_kernels_of_their_own(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama", num_hidden_layers=SIZES + 3))

    def margin(sizes: int) -> int:
        shares = [0.1 + 0.05 * min(layer, sizes - 1) for layer in range(SIZES + 3)]
        plan = engine.plan(8, 8, sparsity=shares, rest="drop")
        assert len(set(plan.kept)) == sizes
        return next(row.bytes for row in plan.rows if row.name == "margin")

    assert margin(1) == margin(SIZES) == margin(SIZES + 3) - 3 * KERNELS


def test_a_gpu_has_the_cache_of_the_answer_from_the_start() -> None:
    sizes = catalogue_sizes({**CATALOGUE["llama-2-7b"].config, "num_hidden_layers": 2})
    for device, answer in (("cpu", 0), ("cuda", 100)):
        request = Request(20, 100, 0.5, 64 * GIB, device, copies=True, fidelity=True)
        rows = {(row.name, row.when): row.bytes for row in make_plan(sizes, request).rows}
        for moment in ("prompt", "fidelity"):
            assert rows["KV cache of the prompt", moment] == sizes.cache(20 + answer)
        assert rows["KV cache with the answer", "answer"] == sizes.cache(120)
