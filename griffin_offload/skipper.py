"""FFN-SkipLLM at work: feed-forward blocks that a token, or a whole answer, leaves out (the rules: skip.py).

Of a block that is left out no neuron takes part: what a bias of the down projection adds stays, its weights are not
read.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import ARCHITECTURES, NO_SIMILARITY
from .errors import OptionError
from .hooks import Residual
from .plan import Plan
from .resident import ResidentLayer
from .sizes import Kept
from .skeleton import Layer, Skeleton
from .skip import WINDOW, Skip, Skipped, Thresholds, most_saturated, next_to_leave

TABLE = 256  # of the prompt's tokens, the last ones: on them the threshold is found


def check_skip(skeleton: Skeleton, skip: Skip, prompts: int = 1, export: bool = False) -> None:
    """Raises OptionError for a model whose blocks cannot be skipped, for several prompts together, and by token for an
    export."""
    if export and not skip.by_prompt:
        raise OptionError("an export has no tokens to skip for: give --ffn-skip-mode prompt")
    if prompts > 1:
        raise OptionError(f"ffn-skip {skip.share:g} is for one prompt at a time, not for {prompts}: leave one out")
    kind = skeleton.config.model_type
    if any(len(layer.blocks) > 1 or block.routed for layer in skeleton.layers for block in layer.blocks):
        raise OptionError(f"ffn-skip needs layers of one plain feed-forward block; {kind!r} has others: leave it out")
    field = NO_SIMILARITY.get(kind, ("", None))
    if kind not in ARCHITECTURES or field is None or (field[0] and getattr(skeleton.config, *field) != field[1]):
        raise OptionError(f"ffn-skip cannot tell how far a block of {kind!r} turns the hidden state: leave it out")


def can_skip(skeleton: Skeleton) -> bool:
    """Whether `check_skip` has nothing against the model."""
    try:
        check_skip(skeleton, Skip(0.5))
    except OptionError:
        return False
    return True


class TokenSkipper:
    """Skips by token. Use as a context manager around one generate of one prompt: its first forward is the prompt's,
    each later one a token's.

    The threshold is found on the prompt; where the answer skips more or less than asked, the share that it is found for
    is corrected by the difference, every WINDOW tokens."""

    def __init__(self, skeleton: Skeleton, skip: Skip, plan: Plan) -> None:
        self._skeleton, self._skip, self._plan = skeleton, skip, plan
        self._numbers = skeleton.block_layers
        self._layers = [skeleton.layers[i] for i in self._numbers]
        self._may = skip.may(len(self._layers))
        self._residuals: dict[int, Residual] = {}
        self._handles: list[Any] = []
        self._switches: list[_Switch] = []
        self._answering = False
        self._table: list[Tensor] = []  # of the prompt: similarity (T,) by block
        self._thresholds: Thresholds | None = None
        self._tokens = 0  # whose forward is done, the prompt not counted
        self._skipped = [0] * len(self._layers)
        self._left = 0  # blocks that the token at hand is yet to skip
        self._threshold = float("inf")
        self._target = skip.share
        self._in_window = 0  # blocks skipped since the share was last looked at

    def __enter__(self) -> "TokenSkipper":
        for block, layer in enumerate(self._layers):
            self._residuals[block] = Residual(layer.module)
            self._handles.append(layer.module.register_forward_hook(partial(self._ran, block)))
        return self

    def __exit__(self, *exc: object) -> None:
        for removable in (*self._handles, *self._residuals.values(), *self._switches):
            removable.remove()
        self._handles, self._residuals, self._switches = [], {}, []

    def result(self) -> Skipped:
        sizes = self._skeleton.sizes().layers
        by_layer, saved = [0.0] * len(self._skeleton.layers), 0.0
        for number, count in zip(self._numbers, self._skipped, strict=True):
            by_layer[number] = count / max(1, self._tokens)
            saved += by_layer[number] * sizes[number].feed_forward(self._plan.kept[number], self._plan.precision)
        return Skipped(self._skip, tuple(by_layer), len(self._layers), round(saved))

    def _ran(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        """After a layer: look how far its block turned the state, and decide on the next one."""
        leaving = output[0] if isinstance(output, tuple) else output
        last = block + 1 == len(self._layers)
        if not self._answering:
            self._table.append(self._residuals[block].similarity(leaving, TABLE))
            if last:
                self._begin_answer()
            return
        self._step(block, leaving)
        if last:
            self._end_token()

    def _begin_answer(self) -> None:
        self._thresholds = Thresholds(torch.stack(self._table, 1).cpu(), self._skip)
        self._table = []
        self._threshold = self._thresholds.of(self._target)
        for block, residual in list(self._residuals.items()):
            residual.settle()
            if block + 1 not in self._may:
                residual.remove()
                del self._residuals[block]
        self._switches = [_Switch(self._skeleton, layer) for layer in self._layers]
        self._answering = True

    def _step(self, block: int, leaving: Tensor) -> None:
        if self._switches[block].off:
            self._switches[block].off = False
            self._skipped[block] += 1
            self._in_window += 1
            self._left -= 1
        elif block in self._residuals and self._tokens >= self._skip.warmup:
            if leaving.shape[:-1].numel() > 1:
                raise OptionError("ffn-skip by token answers a token at a time: leave out speculative decoding")
            similarity = self._residuals[block].similarity_of_token(leaving)
            self._left = self._skip.length(len(self._layers)) if similarity >= self._threshold else 0
        if self._left and block + 1 in self._may:
            self._switches[block + 1].off = True

    def _end_token(self) -> None:
        self._tokens += 1
        self._left = 0
        after = self._tokens - self._skip.warmup
        if after > 0 and after % WINDOW == 0:
            reached = self._in_window / (WINDOW * len(self._layers))
            self._in_window = 0
            self._target = min(1.0, max(0.0, self._target + self._skip.share - reached))
            assert self._thresholds
            self._threshold = self._thresholds.of(self._target)


class Saturation:
    """How far a prompt turns the state in each block that may be skipped, the mean of its tokens, as layers pass."""

    def __init__(self, skeleton: Skeleton, skip: Skip) -> None:
        self._skeleton, self._skip = skeleton, skip
        self._numbers = skeleton.block_layers
        self.may = [self._numbers[block] for block in skip.may(len(self._numbers))]
        self._residuals: dict[int, Residual] = {}
        self._similarity: dict[int, float] = {}  # by layer

    def open(self) -> None:
        self._residuals = {i: Residual(self._skeleton.layers[i].module) for i in self.may}

    def left(self, index: int, hidden: Tensor) -> None:
        if residual := self._residuals.pop(index, None):
            self._similarity[index] = float(residual.similarity(hidden).mean())
            residual.remove()

    def close(self) -> None:
        while self._residuals:
            self._residuals.popitem()[1].remove()

    def skipped(self) -> list[int]:
        """The layers whose blocks the prompt leaves out."""
        return [self._numbers[block] for block in most_saturated(self._table(), self._skip)]

    def _table(self) -> Tensor:
        """(L,), by block; 0 where it was not looked at."""
        return torch.tensor([self._similarity.get(i, 0.0) for i in self._numbers])


class Slots(Saturation):
    """Leaves the most saturated blocks of a prompt without neurons, though which they are is known only at its end.

    There is memory for the blocks that stay, and all are of one size. The last layers have none: as such a layer
    passes, the most saturated of those that have passed gives up its own, or else the layer itself stays empty."""

    def __init__(self, skeleton: Skeleton, skip: Skip, layers: Sequence[ResidentLayer]) -> None:
        """`layers`: as a plan has them (see put_back)."""
        super().__init__(skeleton, skip)
        self._layers = layers
        moves = not all(any(layers[i].kept) for i in self.may)
        for number in self.may:
            layers[number].moves = moves

    def left(self, index: int, hidden: Tensor) -> None:
        super().left(index, hidden)
        if index not in self._similarity or any(self._layers[index].kept):
            return
        passed = {self._numbers.index(i): i == index or any(self._layers[i].kept) for i in self._similarity}
        held, gone = ([block for block, there in passed.items() if there is wanted] for wanted in (True, False))
        most = self._numbers[next_to_leave(held, gone, self._table(), self._skip)]
        if most != index:
            _swap(self._skeleton, self._layers, most, index)  # the stream's end puts it into the modules


def put_back(skeleton: Skeleton, layers: Sequence[ResidentLayer], kept: Kept) -> None:
    """Move memory that an earlier prompt gave to other layers to where a plan has it, if it is as much."""
    others = [i for i, layer in enumerate(layers) if layer.kept != kept[i]]
    lack, have = ([i for i in others if bool(any(kept[i])) is wanted] for wanted in (True, False))
    if len(lack) == len(have) and all(layers[i].kept == kept[j] for i, j in zip(have, lack, strict=True)):
        for i, j in zip(lack, have, strict=True):
            _swap(skeleton, layers, i, j)


def _swap(skeleton: Skeleton, layers: Sequence[ResidentLayer], one: int, other: int) -> None:
    """Two layers swap their blocks' memory."""
    a, b = layers[one], layers[other]
    for block in skeleton.layers[one].blocks:
        for name in block.rows:
            a.tensors[name], b.tensors[name] = b.tensors[name], a.tensors[name]
    a.kept, b.kept = b.kept, a.kept
    a.experts, b.experts = b.experts, a.experts


def left_out(skip: Skip, kept: Kept) -> Skipped:
    """What a prompt's answer left out, by the neurons of its blocks."""
    by_layer = tuple(float(bool(k) and not any(k)) for k in kept)
    return Skipped(skip, by_layer, sum(map(bool, kept)))


class _Switch:
    """Runs a layer's block, or (`off`) leaves it out: its modules then compute with no neurons."""

    def __init__(self, skeleton: Skeleton, layer: Layer) -> None:
        self.off = False
        (block,) = layer.blocks
        self._own: list[tuple[nn.Module, Any]] = []
        width = skeleton.shapes[layer.prefix + block.down][1 - block.rows[block.down].axis]
        for path in dict.fromkeys(name.rpartition(".")[0] for name in block.rows):
            module: Any = layer.module.get_submodule(path)
            self._own.append((module, module.__dict__.get("forward")))
            put = partial(self._forward, module, module.forward, width if path == block.path else 0)
            module.forward = put

    def remove(self) -> None:
        while self._own:
            module, own = self._own.pop()
            del module.forward
            if own is not None:
                module.forward = own  # type: ignore[assignment]

    def _forward(self, module: Any, run: Callable[[Tensor], Tensor], width: int, states: Tensor) -> Tensor:
        """`width`: D of the down projection; 0: an up projection, of no neurons."""
        if not self.off:
            return run(states)
        nothing = states.new_zeros(*states.shape[:-1], width)
        return nothing if not width or module.bias is None else nothing + module.bias
