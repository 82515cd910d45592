"""Layers that several threads send through pinned pieces to the slots of a device."""

from functools import partial

import torch

from griffin_offload.memory.arena import Arena
from griffin_offload.memory.stage_clock import StageClock
from griffin_offload.memory.upload import Ring, Upload
from griffin_offload.offload.prefetch import Load, Prefetch

LAYERS, SLOTS, PIECES, THREADS = 20, 2, 8, 4


def seen_by_each_layer(device: str, piece: int, side: int) -> tuple[list[list[int]], StageClock]:
    """The smallest and largest byte that each layer has in its slot: layer i is all i + 1, if nothing is overwritten or
    read too early.

    The device computes long products (`side`) on each layer, while threads fill the next ones: more pieces than the
    ring has, more layers than slots."""
    clock = StageClock()
    slots = [Arena(PIECES * piece, device) for _ in range(SLOTS)]
    upload, seen = Upload(slots, Ring(THREADS, THREADS + 1, piece), clock), []

    def bring(layer: int, number: int) -> None:
        here = upload.take()
        try:
            source = here.memory.take((piece,), torch.uint8)
            source.fill_(layer + 1)
            target = slots[layer % SLOTS].memory[number * piece : (number + 1) * piece]
            upload.send(here, [(source, target)], layer % SLOTS)
        finally:
            upload.give(here)

    loads = [
        Load([partial(bring, layer, number) for number in range(PIECES)], partial(upload.complete, layer % SLOTS))
        for layer in range(LAYERS)
    ]
    heavy = torch.randn(side, side, device=device)
    clock.start(THREADS)
    with Prefetch(loads, SLOTS, THREADS) as prefetch:
        for layer in range(LAYERS):
            prefetch.wait(layer)
            upload.arrive(layer % SLOTS)
            heavy = (heavy @ heavy).clamp_(-1, 1)
            memory = slots[layer % SLOTS].memory
            seen.append(torch.stack([memory.min(), memory.max()]))
            upload.leave(layer % SLOTS)
            prefetch.release()
    upload.close()
    clock.stop()
    return [pair.tolist() for pair in seen], clock
