"""Many forwards over one read of the weights: they run in lock-step, layer by layer.

Each forward is a job of its own, the model's ordinary forward with its own cache and masks. It runs up to a decoder
layer and waits there; when all jobs wait, the layer is read, each job runs through it in turn, and its memory is given
back. The jobs are greenlets: stacks on one thread, which switch only where they wait.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from ..checkpoint.reader import Reader
from ..memory.spill import Spill
from ..model.skeleton import Skeleton
from ..options import OnLayer
from ..planning.plan import Plan
from .layer_hook import LayerHook
from .layer_stream import LayerStream
from .outer_weights import load_outer_weights
from .resident_layer import ResidentLayer, passing_layers

T = TypeVar("T")


class Lockstep:
    """Runs jobs over the layers of a stream. Use as a context manager.

    `hook`: acts once for all jobs, when a layer begins and when all of them have passed it.
    `job_hooks`: one for each job, which acts on that job's forward alone.
    `sets`: the resident layers that each job leaves, from which it then answers: its later forwards run them. Without
    `sets`, nothing is kept and each job is one forward. Jobs start in order, because a job may read the KV cache that
    an earlier one wrote.
    `spill`: where the states of jobs that wait go; None: they stay where they are. `seed`: every job draws from it."""

    def __init__(
        self,
        skeleton: Skeleton,
        stream: LayerStream,
        *,
        hook: LayerHook | None = None,
        job_hooks: Sequence[LayerHook] = (),
        sets: Sequence[Sequence[ResidentLayer]] = (),
        spill: Spill | None = None,
        seed: int | None = None,
    ) -> None:
        self.job = 0  # the one that runs
        self.layer: int | None = None  # the one that jobs pass; None before the first and after the last
        self._answering = False
        self._skeleton, self._stream, self._sets = skeleton, stream, sets
        self._hook, self._job_hooks = hook or LayerHook(), job_hooks
        self._spill, self._seed = spill, seed
        self._dense: Mapping[str, Tensor] = {}
        self._embedding: Any = None
        self._hub: Any = None

    def __enter__(self) -> "Lockstep":
        self._stream.open(self)
        if spill := self._spill:
            module = self._skeleton.model.get_input_embeddings()
            self._embedding = module.register_forward_hook(lambda _, args, out: spill.embedded(self.job, out))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in (self._hook, *self._job_hooks):
            hook.close()
        if self._spill:
            self._embedding.remove()
            self._spill.close()
        self._stream.close()

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Each job's result, in order; to be called once. Raises what a job raises, after all others are ended."""
        self._hub = getcurrent()
        stacks = [greenlet(job) for job in jobs]
        if self._seed is not None:
            torch.manual_seed(self._seed)
        random = [_random_states()] * len(jobs)
        results: dict[int, T] = {}

        def go_on(index: int) -> None:
            self.job = index
            if self._seed is not None:
                _set_random_states(random[index])
            value = stacks[index].switch()
            if self._seed is not None:
                random[index] = _random_states()
            if stacks[index].dead:
                results[index] = value

        try:
            with torch.no_grad():
                for index in range(len(jobs)):
                    go_on(index)  # up to the first layer
                for number in range(len(self._stream)):
                    if number + 1 == len(self._stream):
                        self._stream.settle()  # each forward goes on to its logits: blocks so large would tear the heap
                    self._pass_layer(number, len(jobs), go_on)
                self.layer, self._answering = None, True
                for index in range(len(jobs)):
                    if not stacks[index].dead:  # its answer, from the layers it left
                        for layer, resident in zip(self._skeleton.layers, self._sets[index], strict=True):
                            self._stream.assign(layer, resident.tensors)
                        go_on(index)
        finally:
            for stack in stacks:
                if stack:  # it waits still, for somebody else's fault
                    stack.throw(GreenletExit)
        return [results[index] for index in range(len(jobs))]

    def enter(self, layer: int, states: Tensor | None) -> None:
        """A job is at a layer with these states (1, T, D): it waits for its turn, unless all layers have passed."""
        if self._answering:
            return
        job = self.job
        if self._spill and states is not None:
            self._spill.put(job, states)
        self._hub.switch()
        if self._spill:
            self._spill.take(job)
        if self._job_hooks and layer == self.layer:  # else it waited to answer
            self._job_hooks[job].before(layer, states)

    def leave(self, layer: int, states: Tensor) -> None:
        if layer != self.layer:
            return
        self._stream.check(layer, states)
        if self._job_hooks:
            self._job_hooks[self.job].after(layer, states, self._dense)

    def _pass_layer(self, layer: int, jobs: int, go_on: Callable[[int], None]) -> None:
        self.layer, self._dense = layer, self._stream.onload(layer)
        self._hook.before(layer, None)
        for job in range(jobs):
            go_on(job)
        self._hook.after(layer, None, self._dense)
        self._dense = {}
        self._stream.release(layer)


def _random_states() -> list[Tensor]:
    """Of the CPU, and of the CUDA device where there is one in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _set_random_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


@contextmanager
def passing(
    skeleton: Skeleton,
    reader: Reader,
    plan: Plan,
    device: str,
    *,
    hooks: Callable[[list[ResidentLayer]], Mapping[str, Any]] = lambda layers: {},
    copies: bool = False,
    spill: Spill | None = None,
    on_layer: OnLayer | None = None,
) -> Iterator[Lockstep]:
    """A lockstep through which the whole model passes once; nothing of it stays.

    `hooks(layers)`: what acts on the memory that layers pass through, as keywords of Lockstep. Called once the outer
    weights are loaded, before layers are read ahead."""
    layers = passing_layers(skeleton.layout, plan.kept, device)
    stream = LayerStream(skeleton, reader, layers, copies=copies, steady=plan.steady_heap, on_layer=on_layer)
    try:
        load_outer_weights(skeleton, reader, device)
        with Lockstep(skeleton, stream, spill=spill, **hooks(layers)) as lockstep:
            yield lockstep
    finally:
        skeleton.slots.unload()


def forwards(skeleton: Skeleton, samples: Sequence[list[int]], device: str) -> list[Callable[[], None]]:
    """A job for each sample of token ids: the model's forward, of which nothing is kept."""

    def forward(ids: list[int]) -> Callable[[], None]:
        def run() -> None:
            skeleton.model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)

        return run

    return [forward(ids) for ids in samples]
