"""Many pairs under many ways of pruning by one read of the weights: the fast form of a score.

The forwards run in lock-step. A prompt's is the full model's and chooses the experts of every row; a continuation's
has a row for each way of pruning, in which all but the experts are zeroed.

C tokens of continuation, T = C - 1 of them read; R rows: the full model, then each way of pruning; F neurons,
E routed experts, V vocabulary."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...engine import Engine
from ...model.hooks import Residual, Tap, pieces_of
from ...offload.pruner import block_magnitude
from ...options import FfnSkip, OnLayer
from ...planning.plan import make_plan
from ...planning.sizes import Kept
from ...planning.waiting import STACK
from ...pruning.selection import Selection
from ...pruning.statistic import neuron_statistic
from ...units import MIB
from .prompt_cache import branch, prompt_cache
from .scored import POSITIONS, Compare, Pair, Scored, join, reduce
from .skipped import Skipped

LOGITS = 64 * MIB  # at most, of one forward: it has as many rows as that allows


@dataclass(frozen=True)
class Row:
    """A row of a batch. `kept`: how many experts, chosen by `selection`; None: all neurons. `skip`: blocks that are
    left out besides, or what `instead` says (see skipped.INSTEAD). `static`: the context, too, passes through the
    pruned model, whose experts no context chooses: as an exported one."""

    selection: Selection = field(default_factory=Selection)
    kept: Kept | None = None
    skip: FfnSkip | None = None
    instead: str = ""
    static: bool = False


def passages(engine: Engine, pairs: Sequence[Pair], rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """Which pairs (numbers) share a read of the weights, and the bytes that they hold meanwhile.

    Pairs of one context are neighbours, so that it is read once, or once a passage. The largest passage is the first:
    what does not fit is refused before anything is read."""
    room = _room(engine, pairs)
    running = max(_running(engine, pair, rows) for pair in pairs)
    found: list[tuple[int, list[int]]] = []
    before: list[int] = []
    for number in _neighbours(pairs):
        prompt, following = _waiting(engine, pairs[number], rows)
        more = following if pairs[number][0] == before else prompt + following
        if found and found[-1][0] + more <= room:
            held, numbers = found[-1]
            numbers.append(number)
            found[-1] = held + more, numbers
        else:
            found.append((running + prompt + following, [number]))
        before = pairs[number][0]
    return sorted(found, reverse=True)


def fits(engine: Engine, pairs: Sequence[Pair], rows: Sequence[Row]) -> bool:
    """Whether the budget has room for that many rows."""
    return passages(engine, pairs, rows)[0][0] <= _room(engine, pairs)


def _room(engine: Engine, pairs: Sequence[Pair]) -> int:
    """Bytes that are left for forwards that wait, if any do."""
    request = replace(engine.opened.request(max(len(context) for context, _ in pairs), 1), export=True, waiting=1)
    return engine.budget - make_plan(engine.sizes, request).peak + request.waiting


def _neighbours(pairs: Sequence[Pair]) -> list[int]:
    """The numbers of all pairs, those of one context together."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(number)
    return [number for numbers in by_context.values() for number in numbers]


def _waiting(engine: Engine, pair: Pair, rows: Sequence[Row]) -> tuple[int, int]:
    """Bytes that a pair's prompt, and its other forwards, hold between two layers: states, masks, keys and values."""
    sizes, prompt, after = engine.sizes, len(pair[0]), len(pair[1]) - 1
    row, mask = 3 * sizes.hidden * sizes.item, 1 + sizes.item  # of a token; of a token that looks at another
    neurons = max((block.neurons * block.routed for layer in sizes.layers for block in layer.blocks), default=0)
    experts = neurons * (4 + len(rows))  # the statistic, and what each row drops
    left = prompt * sum(sizes.cache_per_token) + 4 * sizes.vocabulary
    static = sum(of_row.static for of_row in rows)
    prompts = (1 + static) * (STACK + prompt * (row + prompt * mask) + left) + experts
    forwards = static - (-(len(rows) - static) // _rows_at_once(engine, after)) if after else 0
    following = len(rows) * after * (row + (prompt + after) * mask)
    return prompts, forwards * STACK + following


def _running(engine: Engine, pair: Pair, rows: Sequence[Row]) -> int:
    """Bytes that one forward over a pair's continuation needs in a layer, or for its logits and what they come to."""
    sizes, following = engine.sizes, len(pair[1]) - 1
    together = min(len(rows), _rows_at_once(engine, following))
    logits = (together + 2) * following * sizes.vocabulary * sizes.item + 8 * POSITIONS * sizes.vocabulary * 4
    return logits + sizes.activations(len(pair[0]) + following, together)


def _rows_at_once(engine: Engine, following: int) -> int:
    return max(1, LOGITS // max(1, following * engine.sizes.vocabulary * engine.sizes.item))


class Passage:
    """Pairs over one read of the weights: for every context a forward, then one or more for each continuation."""

    def __init__(
        self,
        engine: Engine,
        pairs: Sequence[Pair],
        rows: Sequence[Row],
        similarities: Mapping[tuple[int, ...], Tensor] | None = None,
    ) -> None:
        """`similarities`: of every context, where a row skips blocks."""
        self.engine, self.rows, self.similarities = engine, rows, similarities or {}
        self.block_of = {layer: block for block, layer in enumerate(engine.skeleton.layout.block_layers)}
        self.truth = torch.empty(0)  # the full model's logits (T, V) of the continuation whose forwards end now
        self.compare = Compare(engine.sizes.vocabulary, engine.device)
        self._pairs = pairs

    def run(self, tokens: int, waiting: int, on_layer: OnLayer) -> list[list[Scored]]:
        """By pair and row. `tokens`, `waiting`: as Engine.passage has them."""
        prompts: dict[tuple[int, ...], list[_Prompt]] = {}
        jobs: list[_Prompt | _Following] = []
        places = []  # among the jobs, of each pair's
        for context, continuation in self._pairs:
            if tuple(context) not in prompts:
                prompts[tuple(context)] = [_Prompt(self, context, numbers) for numbers in self._sharing()]
                jobs += prompts[tuple(context)]
            begin = len(jobs)
            together = _rows_at_once(self.engine, len(continuation) - 1)
            for prompt in prompts[tuple(context)] if len(continuation) > 1 else ():
                for first in range(0, len(prompt.numbers), together):
                    which = slice(first, min(first + together, len(prompt.numbers)))
                    jobs.append(_Following(self, prompt, continuation, which))
            places.append(slice(begin, len(jobs)))

        def watch(layer: int, block: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
            return jobs[passage.job].watch(layer, block, z, tokens, expert)

        with ExitStack() as stack:
            passage = stack.enter_context(self.engine.passage(tokens, waiting, on_layer))
            for index, layer in enumerate(self.engine.skeleton.layers if len(self.rows) > 1 else ()):
                module = self.engine.skeleton.modules[index]
                for number, block in enumerate(layer.blocks):
                    stack.callback(Tap(module, block.path, partial(watch, index, number)).remove)
                if self.similarities and layer.blocks:
                    residual = Residual(module)
                    stack.callback(residual.remove)

                    def leave(
                        _: Any, args: Any, kwargs: Any, out: Any, index: int = index, r: Residual = residual
                    ) -> Any:
                        entering = args[0] if args else kwargs["hidden_states"]
                        return jobs[passage.job].leave(index, entering, out, r)

                    stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            results = passage.run(jobs)
        scored = []
        for (context, continuation), place in zip(self._pairs, places, strict=True):
            truth = prompts[tuple(context)][0]
            rest = iter([of_row for of_job in results[place] for of_row in of_job])
            of_pair = {}
            for prompt in prompts[tuple(context)]:
                head = prompt.predict(continuation[0], truth)
                for number in prompt.numbers:
                    of_pair[number] = join([head, next(rest)]) if len(continuation) > 1 else head
            scored.append([of_pair[number] for number in range(len(self.rows))])
        return scored

    def _sharing(self) -> list[list[int]]:
        """Rows by the prompt that they share: the full model's (its row is the first), and each static row's own."""
        own = [number for number, row in enumerate(self.rows) if row.static]
        return [[number for number in range(len(self.rows)) if number not in own], *([number] for number in own)]


class _Prompt:
    """The context by the full model, or by a static row's own: its keys and values, what it predicts, and what each of
    its rows drops of the layer at hand. `numbers`: of the rows that go on from it."""

    def __init__(self, passage: Passage, ids: Sequence[int], numbers: Sequence[int]) -> None:
        self.tokens, self.cache, self.ids = len(ids), prompt_cache(), tuple(ids)
        self.numbers, self.rows = numbers, [passage.rows[number] for number in numbers]
        self._passage, self._static = passage, self.rows[0].static
        self._logits = torch.empty(0)  # (1, V), of the last token
        self._layer = -1
        self._statistics: dict[int, Tensor] = {}  # by block: (F,) or (E, F)
        self._dropped: dict[int, Tensor] = {}  # by block: (R, F) or (R, E, F), bool

    def __call__(self) -> list[Scored]:
        engine = self._passage.engine
        ids = torch.tensor([self.ids], device=engine.device)
        output = engine.skeleton.model(ids, past_key_values=self.cache, use_cache=True, **engine.opened.last_logits)
        self._logits = output.logits[0, -1:].clone()
        return []

    def predict(self, token: int, truth: "_Prompt") -> Scored:
        """Of the first token after it, (1,); `truth`: the full model's prompt."""
        ours, theirs = (prompt._logits.float().log_softmax(-1) for prompt in (self, truth))
        return join([reduce(ours, theirs, torch.tensor([token], device=ours.device))])

    def watch(self, layer: int, block: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
        if layer != self._layer:
            self._layer, self._statistics, self._dropped = layer, {}, {}
        if block not in self._statistics:
            shape = self._passage.engine.skeleton.layers[layer].blocks[block].statistic_shape
            self._statistics[block] = torch.zeros(shape, dtype=torch.float32, device=z.device)
        if self._static:
            (dropped,) = self.dropped(block)
            return z.masked_fill(dropped if expert is None else dropped[expert], 0)
        total = self._statistics[block] if expert is None else self._statistics[block][expert]
        total += neuron_statistic(z)
        return None

    def leave(self, layer: int, entering: Tensor, output: Any, residual: Residual) -> None:
        """Nothing of a prompt is left out."""

    def dropped(self, block: int) -> Tensor:
        """What is no expert of the layer at hand, for every row."""
        if block not in self._dropped:
            statistic, layer = self._statistics[block], self._passage.engine.skeleton.layers[self._layer]
            neurons = layer.blocks[block]
            module = self._passage.engine.skeleton.modules[self._layer]
            dense = {name: module.get_parameter(name) for name in neurons.rows}
            dropped = torch.zeros((len(self.rows), *statistic.shape), dtype=torch.bool, device=statistic.device)
            same: dict[tuple[Selection, int], Tensor] = {}  # rows often differ in another layer
            for row, of_row in zip(dropped, self.rows, strict=True):
                if of_row.kept is None or (kept := of_row.kept[self._layer][block]) == neurons.neurons:
                    continue
                how = of_row.selection, kept
                if how not in same:
                    weights = partial(block_magnitude, neurons, dense)
                    experts = of_row.selection.choose(statistic, kept, self._layer, weights, block)
                    same[how] = row.fill_(True).scatter_(-1, experts, False)
                row.copy_(same[how])
            self._dropped[block] = dropped
        return self._dropped[block]


class _Following:
    """A continuation, but for its last token, by some of the rows."""

    def __init__(self, passage: Passage, prompt: _Prompt, ids: Sequence[int], rows: slice) -> None:
        self._passage, self._prompt, self._ids, self._rows = passage, prompt, ids, rows
        self._skipped: Skipped | None = None
        if any(row.skip for row in prompt.rows[rows]):
            skips = [(row.skip, row.instead) for row in prompt.rows[rows]]
            self._skipped = Skipped(skips, len(ids) - 1, passage.similarities[prompt.ids])
        self._layer, self._now = -1, torch.empty(0)  # (R T,), bool: who leaves out the block of the layer at hand

    def __call__(self) -> list[Scored]:
        """By row, all tokens after the first."""
        engine, prompt = self._passage.engine, self._prompt
        ids = torch.tensor([self._ids], device=engine.device)
        cache = branch(prompt.cache, prompt.tokens, len(engine.skeleton.layers))
        rows = ids[:, :-1].expand(self._rows.stop - self._rows.start, -1)
        logits = engine.skeleton.model(rows, past_key_values=cache, use_cache=True).logits
        if self._rows.start == 0 and prompt.numbers[0] == 0:
            self._passage.truth = logits[0].clone()  # for the forwards of the other rows, which end next
        return self._passage.compare(logits, self._passage.truth, ids[0, 1:])

    def watch(self, layer: int, block: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
        dropped = self._prompt.dropped(block)[self._rows]
        dropped = dropped if expert is None else dropped[:, expert]
        skeleton = self._passage.engine.skeleton
        pieces = pieces_of(skeleton.modules[layer], skeleton.layers[layer].blocks[block].path)
        places = torch.arange(z.shape[:-1].numel(), device=z.device) if tokens is None else tokens
        places = places + (pieces.begin if pieces else 0)
        rows = places // (len(self._ids) - 1)  # of the batch: one for each z
        absent = dropped[rows]
        if self._skipped:
            if layer != self._layer:
                self._layer, self._now = layer, self._skipped.at(self._passage.block_of[layer]).flatten()
            absent = absent | self._now[places, None]
        return z.masked_fill(absent.view(z.shape), 0)

    def leave(self, layer: int, entering: Tensor, output: Any, residual: Residual) -> Any:
        """After a layer: what it shows of its block, and its output, but for the tokens that leave it out whole."""
        if not self._skipped:
            return None
        leaving = output[0] if isinstance(output, tuple) else output
        whole = self._skipped.whole_layers
        self._skipped.update(self._passage.block_of[layer], residual.similarity(leaving))
        if not whole.any():
            return None
        leaving = torch.where(whole[..., None], entering, leaving)
        return (leaving, *output[1:]) if isinstance(output, tuple) else leaving
