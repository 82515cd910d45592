"""FFN-SkipLLM by token: each token of the answer skips feed-forward blocks for itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..model.hooks import Residual
from ..model.layout import Layer
from ..model.skeleton import Skeleton
from ..options import FfnSkip
from ..planning.plan import Plan
from ..planning.sizes import model_sizes
from ..pruning.ffn_skip import WINDOW, SkippedBlocks, Thresholds

TABLE = 256  # of the prompt's tokens, the last ones: on them the threshold is found


class TokenSkipper:
    """Skips by token. Use as a context manager around one generate of one prompt: its first forward is the prompt's,
    each later one a token's.

    The threshold is found on the prompt; where the answer skips more or less than asked, the share that it is found for
    is corrected by the difference, every WINDOW tokens."""

    def __init__(self, skeleton: Skeleton, skip: FfnSkip, plan: Plan) -> None:
        self._skeleton, self._skip, self._plan = skeleton, skip, plan
        self._numbers = skeleton.block_layers
        self._layers = [skeleton.layers[i] for i in self._numbers]
        self._may = skip.skippable(len(self._layers))
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

    def result(self) -> SkippedBlocks:
        sizes = model_sizes(self._skeleton).layers
        by_layer, saved = [0.0] * len(self._skeleton.layers), 0.0
        for number, count in zip(self._numbers, self._skipped, strict=True):
            by_layer[number] = count / max(1, self._tokens)
            saved += by_layer[number] * sizes[number].feed_forward(self._plan.kept[number], self._plan.precision)
        return SkippedBlocks(self._skip, tuple(by_layer), len(self._layers), round(saved))

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
