"""FFN-SkipLLM by token (the rules: pruning/ffn_skip.py): each token of the answer skips feed-forward blocks for itself.

A skipped block adds only its down projection's bias; its weights are not read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.hooks import Residual
from ..model.layout import Block
from ..model.skeleton import Skeleton
from ..options import FfnSkip
from ..planning.plan import Plan
from ..planning.sizes import model_sizes
from ..pruning.ffn_skip import WINDOW, SkippedBlocks, Thresholds

TABLE = 256  # the prompt's last tokens, on which the threshold is found


@dataclass
class _Answer:
    """The answer so far. `target`: the share that the threshold is found for, corrected every WINDOW tokens by how much
    more or less was skipped than asked.

    `skipped`: tokens that skipped each block; `pending`: blocks that the token at hand is yet to skip; `in_window`:
    blocks skipped since the target was last corrected."""

    thresholds: Thresholds
    switches: list["_Switch"]
    skipped: list[int]
    target: float
    threshold: float
    tokens: int = 0
    pending: int = 0
    in_window: int = 0


class TokenSkipper:
    """Skips by token. Use as a context manager around one generate of one prompt: its first forward is the prompt's,
    each later one a token's."""

    def __init__(self, skeleton: Skeleton, skip: FfnSkip, plan: Plan) -> None:
        self._skeleton, self._skip, self._plan = skeleton, skip, plan
        self._layers = skeleton.layout.block_layers
        self._skippable = skip.skippable(len(self._layers))
        self._residuals: dict[int, Residual] = {}
        self._handles: list[Any] = []
        self._prompt: list[Tensor] = []  # similarity (T,) by block
        self._answer: _Answer | None = None  # while the prompt passes

    def __enter__(self) -> "TokenSkipper":
        for block, layer in enumerate(self._layers):
            module = self._skeleton.modules[layer]
            self._residuals[block] = Residual(module)
            self._handles.append(module.register_forward_hook(partial(self._ran, block)))
        return self

    def __exit__(self, *exc: object) -> None:
        switches = self._answer.switches if self._answer else []
        for removable in (*self._handles, *self._residuals.values(), *switches):
            removable.remove()
        self._handles, self._residuals = [], {}

    def result(self) -> SkippedBlocks:
        sizes = model_sizes(self._skeleton.layout).layers
        tokens, counts = (self._answer.tokens, self._answer.skipped) if self._answer else (0, [0] * len(self._layers))
        by_layer, saved = [0.0] * len(sizes), 0.0
        for layer, skipped in zip(self._layers, counts, strict=True):
            by_layer[layer] = skipped / max(1, tokens)
            saved += by_layer[layer] * sizes[layer].feed_forward(self._plan.kept[layer], self._plan.precision)
        return SkippedBlocks(self._skip, tuple(by_layer), len(self._layers), round(saved))

    def _ran(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        """After a layer: look how far its block turned the states, and decide on the next one."""
        leaving = output[0] if isinstance(output, tuple) else output
        last = block + 1 == len(self._layers)
        if self._answer is None:
            similarity = self._residuals[block].similarity(leaving, TABLE)
            self._prompt.append(similarity.to(self._prompt[0].device) if self._prompt else similarity)
            if last:
                self._answer = self._begin_answer()
            return
        self._decide(self._answer, block, leaving)
        if last:
            self._end_token(self._answer)

    def _begin_answer(self) -> _Answer:
        thresholds = Thresholds(torch.stack(self._prompt, 1).cpu(), self._skip)
        self._prompt = []
        for block, residual in list(self._residuals.items()):
            residual.settle()
            if block + 1 not in self._skippable:
                residual.remove()
                del self._residuals[block]
        switches = [_Switch(self._skeleton, layer) for layer in self._layers]
        share = self._skip.share
        return _Answer(thresholds, switches, [0] * len(self._layers), share, thresholds.of(share))

    def _decide(self, answer: _Answer, block: int, leaving: Tensor) -> None:
        if answer.switches[block].off:
            answer.switches[block].off = False
            answer.skipped[block] += 1
            answer.in_window += 1
            answer.pending -= 1
        elif block in self._residuals and answer.tokens >= self._skip.warmup:
            similarity = self._residuals[block].similarity_of_token(leaving)
            answer.pending = self._skip.length(len(self._layers)) if similarity >= answer.threshold else 0
        if answer.pending and block + 1 in self._skippable:
            answer.switches[block + 1].off = True

    def _end_token(self, answer: _Answer) -> None:
        answer.tokens += 1
        answer.pending = 0
        after = answer.tokens - self._skip.warmup
        if after > 0 and after % WINDOW == 0:
            reached = answer.in_window / (WINDOW * len(self._layers))
            answer.in_window = 0
            answer.target = min(1.0, max(0.0, answer.target + self._skip.share - reached))
            answer.threshold = answer.thresholds.of(answer.target)


class _Switch:
    """Runs a layer's block or, while `off`, skips it: its modules then compute with no neurons."""

    def __init__(self, skeleton: Skeleton, layer: int) -> None:
        self.off = False
        self._patched: list[tuple[nn.Module, Any]] = []
        within: nn.Module = skeleton.modules[layer]
        block: Block
        (block,) = skeleton.layers[layer].blocks
        down = skeleton.layout.shapes[skeleton.layers[layer].prefix + block.down]
        for path in dict.fromkeys(name.rpartition(".")[0] for name in block.rows):
            module: Any = within.get_submodule(path)
            self._patched.append((module, module.__dict__.get("forward")))
            width = down[1 - block.rows[block.down].axis] if path == block.path else 0
            module.forward = partial(self._forward, module, module.forward, width)

    def remove(self) -> None:
        while self._patched:
            module, own = self._patched.pop()
            del module.forward
            if own is not None:
                module.forward = own  # type: ignore[assignment]

    def _forward(self, module: Any, run: Callable[[Tensor], Tensor], width: int, states: Tensor) -> Tensor:
        """`width`: D of the down projection; 0: an up projection, of no neurons."""
        if not self.off:
            return run(states)
        nothing = states.new_zeros(*states.shape[:-1], width)
        return nothing if not width or module.bias is None else nothing + module.bias
