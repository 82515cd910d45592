"""What every neuron is worth to many samples, which pass through the model in one sweep: all of them through a layer
before the next is read. The scores make a prior, or choose the experts of a static model.

z (T, F) enters the down projection, whose matrix is W (D, F). Of neuron j:
griffin     Σ z̄², over all tokens of all samples (arXiv:2404.01365)
wanda       Σ z² |W_j|², of a column of W: Wanda's |x| |w| (Sun et al. 2023, arXiv:2306.11695) for a neuron as a whole
magnitude   the squared product of the norms of its rows in gate and up
random      drawn, by seed and layer
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.reader import Reader
from ..errors import NumericError
from ..memory.machine import MARGIN, available_memory
from ..memory.spill import Spill
from ..model.hooks import ObserveNeurons
from ..model.layout import Block
from ..model.modules import PIECE
from ..model.skeleton import Skeleton
from ..options import OnLayer
from ..planning.plan import Plan, make_plan
from ..planning.request import Request
from ..planning.sizes import ModelSizes, model_sizes
from ..pruning.calibration import Calibration
from ..pruning.prior import Prior, Scores
from ..pruning.statistic import NeuronWeights
from .layer_stream import LayerStream
from .lockstep import STACK, Lockstep
from .outer_weights import load_outer_weights
from .resident_layer import ResidentLayer, passing_layers
from .sweep import Pruner, block_magnitude


class Scorer:
    """Leaves the scores of every block in the layers' `statistics`, which are 0 before, over all forwards between
    `begin` and `end`.

    `pruner` then chooses and gathers by them."""

    def __init__(
        self, skeleton: Skeleton, layers: Sequence[ResidentLayer], static: Calibration, pruner: Pruner | None = None
    ) -> None:
        self._skeleton, self._layers, self._pruner = skeleton, layers, pruner
        self._statistic, self._seed = static.statistic, static.seed
        self._observers: list[ObserveNeurons] = []

    def begin(self, index: int) -> None:
        layer = self._skeleton.layers[index]
        for block, total in zip(layer.blocks, self._layers[index].statistics, strict=True):
            if measure := self._statistic.sums:
                pieces = self._skeleton.pieces_of(layer, block)
                observer = ObserveNeurons(layer.module, block.path, total, pieces=pieces, measure=measure)
                self._observers.append(observer)

    def end(self, index: int, dense: Mapping[str, Tensor]) -> None:
        self.stop()
        layer = self._skeleton.layers[index]
        for place, (block, total) in enumerate(zip(layer.blocks, self._layers[index].statistics, strict=True)):
            if finish := self._statistic.finish:
                seed = (self._seed * 10007 + index) * 101 + place
                weights = NeuronWeights(partial(block_magnitude, block, dense), partial(down_squares, block, dense))
                total.copy_(finish(total, weights, seed))
            if not total.isfinite().all():
                raise NumericError(
                    f"the scores of {layer.prefix}{block.path} are NaN or infinite in {self._skeleton.dtype}; "
                    "try --dtype float32"
                )
        if self._pruner:
            self._pruner.keep(index, dense)

    def stop(self) -> None:
        while self._observers:
            self._observers.pop().remove()


def scores_of(layers: Sequence[ResidentLayer]) -> Scores:
    """What a sweep left in the layers' statistics."""
    return tuple(tuple(total.cpu() for total in layer.statistics) for layer in layers)


def down_squares(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """|W_j|² of a block's down projection: (F,) or (E, F), float32."""
    (rows,) = block.rows[block.down].split(dense[block.down])
    norms: Tensor = rows.norm(dim=-1, dtype=torch.float32)
    return norms.square_()


def forwards(skeleton: Skeleton, samples: Sequence[list[int]], device: str) -> list[Callable[[], None]]:
    """A job for each sample: the model's forward, of which nothing is kept."""

    def forward(ids: list[int]) -> Callable[[], None]:
        def run() -> None:
            skeleton.model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)

        return run

    return [forward(ids) for ids in samples]


def find_room(
    skeleton: Skeleton, request: Request, static: Calibration, host_memory: int | None, folder: Path
) -> tuple[Request, Spill]:
    """Where the states of all samples wait, and the request that counts what of them is on the device.

    In RAM: `host_memory` bytes of them (None: as much as there is), on the CPU no more than the budget leaves.
    Raises GriffinError where the disk has too little space for the others."""
    sizes = model_sizes(skeleton)
    state = 2 * sizes.hidden * sizes.item  # of a token: what the embedding put out is held besides
    beside = sum(_beside(skeleton, sizes, len(ids)) for ids in static.samples)
    scores = sum(4 * math.prod(block.statistic_shape) for layer in skeleton.layers for block in layer.blocks)
    request = replace(request, waiting=beside + scores)
    free = int(available_memory() * (1 - MARGIN)) if request.copies else request.budget - make_plan(sizes, request).peak
    room = max(0, free if host_memory is None else min(free, host_memory))
    inside = on_disk = 0
    for ids in static.samples:  # as Spill counts them
        if inside + len(ids) * state <= room:
            inside += len(ids) * state
        else:
            on_disk += len(ids) * state
    waiting = Spill(room, folder, on_disk)
    return (request if request.copies else replace(request, waiting=beside + scores + inside)), waiting


def _beside(skeleton: Skeleton, sizes: ModelSizes, tokens: int) -> int:
    """Bytes that a forward holds between two layers besides its states: stack, ids, rotary embeddings, masks."""
    config = skeleton.config
    head: int = sizes.heads // config.num_attention_heads
    inputs: int = getattr(config, "hidden_size_per_layer_input", None) or 0
    row = 32 + (4 * head + inputs * len(skeleton.layers)) * sizes.item
    slides = any(window is not None and tokens > window for window in sizes.windows)
    late = sizes.in_pieces and (tokens > PIECE or not (slides or sizes.score_heads))  # no mask, or written in pieces
    return STACK + tokens * row + (0 if late else tokens * tokens * (1 + sizes.item))


def sum_scores(
    skeleton: Skeleton,
    reader: Reader,
    plan: Plan,
    static: Calibration,
    waiting: Spill,
    device: str,
    on_layer: OnLayer | None,
) -> Prior:
    """The scores of all samples, from one reading of the weights; the skeleton is empty after it.

    Raises CheckpointError, NumericError."""
    layers = passing_layers(skeleton, plan.kept, device)
    stream = LayerStream(skeleton, reader, layers, copies=device != "cpu", steady=plan.steady_heap, on_layer=on_layer)
    try:
        load_outer_weights(skeleton, reader, device)
        with Lockstep(skeleton, stream, together=Scorer(skeleton, layers, static), waiting=waiting) as lockstep:
            lockstep.run(forwards(skeleton, static.samples, device))
    finally:
        skeleton.unload()
    return Prior(scores_of(layers), static.to_json())
