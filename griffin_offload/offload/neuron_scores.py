"""Scores of all neurons over many samples, which pass through the model in one sweep: all of them through a layer
before the next is read. The scores make a prior, or choose the neurons of a static model.

z (T, F) enters the down projection, whose matrix is W (D, F). Of neuron j:
griffin     Σ z̄², over all tokens of all samples (arXiv:2404.01365)
wanda       Σ z² |W_j|², of a column of W: Wanda's |x| |w| (Sun et al. 2023, arXiv:2306.11695) for a neuron as a whole
magnitude   the squared product of the norms of its rows in gate and up
random      drawn, by seed and layer
"""

from collections.abc import Mapping, Sequence
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
from ..model.layout import Block, ModelLayout
from ..model.skeleton import Skeleton
from ..options import OnLayer
from ..planning.plan import Plan, make_plan
from ..planning.request import Request
from ..planning.sizes import model_sizes
from ..planning.waiting import score_bytes, state_bytes, waiting_bytes
from ..pruning.calibration import Calibration
from ..pruning.prior import Prior, Scores
from ..pruning.statistic import NeuronWeights
from .folding import Folding
from .layer_hook import LayerHook
from .lockstep import forwards, passing
from .pruner import block_magnitude
from .resident_layer import ResidentLayer


class Scorer(LayerHook):
    """Leaves the scores of every block in the layers' `statistics`, which are 0 before, over all forwards that pass a
    layer. `folding`: gets rows of z too."""

    def __init__(
        self,
        skeleton: Skeleton,
        layers: Sequence[ResidentLayer],
        calibration: Calibration,
        folding: Folding | None = None,
    ) -> None:
        self._layout, self._modules, self._layers, self._folding = skeleton.layout, skeleton.modules, layers, folding
        self._statistic, self._seed = calibration.statistic, calibration.seed
        self._observers: list[ObserveNeurons] = []

    def before(self, layer: int, states: Tensor | None) -> None:
        if measure := self._statistic.sums:
            blocks = zip(self._layout.layers[layer].blocks, self._layers[layer].statistics, strict=True)
            for number, (block, total) in enumerate(blocks):
                folds = self._folding if self._layers[layer].kept[number] < block.neurons else None
                rows = folds.rows(number) if folds else None
                observer = ObserveNeurons(self._modules[layer], block.path, total, measure=measure, activations=rows)
                self._observers.append(observer)

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        self.close()
        of_layer = self._layout.layers[layer]
        for number, (block, total) in enumerate(zip(of_layer.blocks, self._layers[layer].statistics, strict=True)):
            if finish := self._statistic.finish:
                seed = (self._seed * 10007 + layer) * 101 + number
                weights = NeuronWeights(partial(block_magnitude, block, dense), partial(down_squares, block, dense))
                total.copy_(finish(total, weights, seed))
            if not total.isfinite().all():
                raise NumericError(
                    f"the scores of {of_layer.prefix}{block.path} are NaN or infinite in {self._layout.dtype}; "
                    "try --dtype float32"
                )

    def close(self) -> None:
        while self._observers:
            self._observers.pop().remove()


def scores_of(layers: Sequence[ResidentLayer]) -> Scores:
    """What a pass left in the layers' statistics."""
    return tuple(tuple(total.cpu() for total in layer.statistics) for layer in layers)


def down_squares(block: Block, dense: Mapping[str, Tensor]) -> Tensor:
    """|W_j|² of a block's down projection: (F,) or (E, F), float32."""
    (rows,) = block.rows[block.down].split(dense[block.down])
    norms: Tensor = rows.norm(dim=-1, dtype=torch.float32)
    return norms.square_()


def find_room(
    layout: ModelLayout, request: Request, calibration: Calibration, host_memory: int | None, folder: Path
) -> tuple[Request, Spill]:
    """Where the hidden states of all samples wait, and the request that counts what of them is on the device.

    In RAM: `host_memory` bytes of them (None: as much as there is), on the CPU no more than the budget leaves; the
    others in a file in `folder`. Raises GriffinError where the disk has too little space for them."""
    sizes, samples = model_sizes(layout), calibration.samples
    held = sum(waiting_bytes(layout, sizes, len(ids)) for ids in samples) + score_bytes(layout)
    request = replace(request, waiting=held)
    free = int(available_memory() * (1 - MARGIN)) if request.copies else request.budget - make_plan(sizes, request).peak
    room = max(0, free if host_memory is None else min(free, host_memory))
    in_ram = on_disk = 0
    for ids in samples:  # as Spill counts them
        state = state_bytes(sizes, len(ids))
        if in_ram + state <= room:
            in_ram += state
        else:
            on_disk += state
    spill = Spill(room, folder, on_disk)
    return (request if request.copies else replace(request, waiting=held + in_ram)), spill


def sum_scores(
    skeleton: Skeleton,
    reader: Reader,
    plan: Plan,
    calibration: Calibration,
    spill: Spill,
    device: str,
    on_layer: OnLayer | None,
) -> Prior:
    """The scores of all samples, from one reading of the weights; the model is unloaded after it.

    Raises CheckpointError, NumericError."""
    passed: list[ResidentLayer] = []

    def hooks(layers: list[ResidentLayer]) -> Mapping[str, LayerHook]:
        passed.extend(layers)
        return {"hook": Scorer(skeleton, layers, calibration)}

    copies = device != "cpu"
    with passing(
        skeleton, reader, plan, device, hooks=hooks, copies=copies, spill=spill, on_layer=on_layer
    ) as lockstep:
        lockstep.run(forwards(skeleton, calibration.samples, device))
    return Prior(scores_of(passed), calibration.to_json())
