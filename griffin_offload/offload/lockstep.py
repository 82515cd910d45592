"""Many forwards over one read of the weights: they run in lock-step, layer by layer.

Each forward is a job of its own, the model's ordinary forward with its own cache and masks. It runs up to a decoder
layer and waits there; when all jobs wait, the layer is read, each job runs through it in turn, and its memory is given
back. The jobs are greenlets: stacks on one thread, which switch only where they wait.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from ..memory.spill import Spill
from ..model.skeleton import Skeleton
from ..units import KIB
from .layer_stream import LayerStream
from .resident_layer import ResidentLayer
from .sweep import Pruner, Slots

STACK = 64 * KIB  # of one forward that waits (measured)
T = TypeVar("T")


class Together(Protocol):
    """What acts on a layer once for all jobs, as a Pruner does for one."""

    def begin(self, index: int) -> None: ...

    def end(self, index: int, dense: Mapping[str, Tensor]) -> None: ...

    def stop(self) -> None: ...


class Lockstep:
    """Runs jobs over the layers of a stream. Use as a context manager.

    `sets`: a pruner and the layers it fills for every job, whose first forward is then the sweep over its prompt and
    whose later ones run its own resident layers. Without: nothing stays, and a job makes one forward. A job may start
    only when one before it has passed a layer, since its forward reads what that one left: jobs run in their order.
    `waiting`: where the states of jobs that wait go; None: they stay where they are.
    `together`: hears when a layer begins and when all jobs have passed it, its dense weights still in place; `slots`:
    with what states each job leaves it.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        stream: LayerStream,
        sets: Sequence[tuple[Pruner, Sequence[ResidentLayer]]] = (),
        seed: int | None = None,
        together: Together | None = None,
        waiting: Spill | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.job = self.layer = -1
        self._answering = False
        self._skeleton, self._stream, self._sets = skeleton, stream, sets
        self._seed, self._together, self._waiting, self._slots = seed, together, waiting, slots
        self._embedding: Any = None
        self._hub: Any = None

    def __enter__(self) -> "Lockstep":
        self._stream.open(self)
        if self._slots:
            self._slots.open()
        if waiting := self._waiting:
            module = self._skeleton.model.get_input_embeddings()
            self._embedding = module.register_forward_hook(lambda _, args, out: waiting.embedded(self.job, out))
        return self

    def __exit__(self, *exc: object) -> None:
        for pruner, _ in self._sets:
            pruner.stop()
        if self._together:
            self._together.stop()
        if self._slots:
            self._slots.close()
        if self._waiting:
            self._embedding.remove()
            self._waiting.close()
        self._stream.close()

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Each job's result, in order; to be called once. Raises what a job raises, after all others are ended."""
        self._hub = getcurrent()
        stacks = [greenlet(job) for job in jobs]
        random = [self._random_state()] * len(jobs)
        results: dict[int, T] = {}

        def go_on(index: int) -> None:
            self.job = index
            if self._seed is not None:
                torch.set_rng_state(random[index])
            value = stacks[index].switch()
            if self._seed is not None:
                random[index] = torch.get_rng_state()
            if stacks[index].dead:
                results[index] = value

        try:
            with torch.no_grad():
                for index in range(len(jobs)):
                    go_on(index)  # up to the first layer
                for number in range(len(self._skeleton.layers)):
                    self.layer = number
                    if number + 1 == len(self._skeleton.layers):
                        self._stream.settle()  # each forward goes on to its logits: blocks so large would tear the heap
                    self._pass_layer(number, len(jobs), go_on)
                self.layer, self._answering = -1, True
                for index in range(len(jobs)):
                    if not stacks[index].dead:  # its answer, from the layers it left
                        for layer, resident in zip(self._skeleton.layers, self._sets[index][1], strict=True):
                            self._stream.assign(layer, resident.tensors)
                        go_on(index)
        finally:
            for stack in stacks:
                if stack:  # it waits still, for somebody else's fault
                    stack.throw(GreenletExit)
        return [results[index] for index in range(len(jobs))]

    def enter(self, index: int, states: Tensor | None) -> None:
        """A job is at a layer with these states (1, T, D): it waits for its turn, unless all layers have passed."""
        if self._answering:
            return
        job = self.job
        if self._waiting and states is not None:
            self._waiting.put(job, states)
        self._hub.switch()
        if self._waiting:
            self._waiting.take(job)

    def leave(self, index: int, hidden: Tensor) -> None:
        if index == self.layer:
            self._stream.check(index, hidden)
            if self._slots:
                self._slots.left(index, hidden)

    def _pass_layer(self, index: int, jobs: int, go_on: Callable[[int], None]) -> None:
        dense = self._stream.onload(index)
        if self._together:
            self._together.begin(index)
        for job in range(jobs):
            if self._sets:
                self._sets[job][0].begin(index)
            go_on(job)
            if self._sets:
                self._sets[job][0].end(index, dense)
        if self._together:
            self._together.end(index, dense)
        self._stream.release(index)

    def _random_state(self) -> Tensor:
        if self._seed is not None:
            torch.manual_seed(self._seed)
        return torch.get_rng_state()
