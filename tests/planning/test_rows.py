"""Rows of a plan (griffin_offload.planning.rows)."""

from pathlib import Path

from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.planning.rows import KERNELS, SIZES


def test_layers_of_many_sizes_have_kernels_of_their_own(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama", num_hidden_layers=SIZES + 3))

    def margin(sizes: int) -> int:
        shares = [0.1 + 0.05 * min(layer, sizes - 1) for layer in range(SIZES + 3)]
        plan = engine.plan(8, 8, sparsity=shares, rest="drop")
        assert len(set(plan.kept)) == sizes
        return next(row.bytes for row in plan.rows if row.name == "margin")

    assert margin(1) == margin(SIZES) == margin(SIZES + 3) - 3 * KERNELS
