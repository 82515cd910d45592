"""An arena: where tensors lie in it."""

import torch

from griffin_offload.memory.arena import LARGE, PAGE, Arena, padded


def test_an_arena_sets_large_tensors_to_a_phase() -> None:
    arena = Arena(8 * LARGE)
    small = arena.take((5,), torch.uint8, phase=100)
    one, two = (arena.take((LARGE,), torch.uint8, phase=phase) for phase in (100, 0))
    assert [t.data_ptr() % PAGE for t in (small, one, two)] == [0, 100, 0]
    assert arena.used <= padded(5) + 2 * padded(LARGE)
