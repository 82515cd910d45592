"""The forwards of a scoring pass: a prompt's, which chooses each row's neurons, and a continuation's, in which all
other neurons are zeroed. Each job is its own layer hook.

P prompt tokens, T tokens of a continuation that are read; R rows (ways of pruning) of a forward; F neurons, E routed
experts, V vocabulary."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ...engine import Engine
from ...model.hooks import Activations, CountedTokens, Residual, Tap, pieces_of
from ...offload.layer_hook import LayerHook
from ...offload.pruner import block_magnitude
from ...pruning.fold import fold_tokens, joined, predicted
from ...pruning.selection import Selection
from ...pruning.statistic import neuron_statistic
from .prompt_cache import forked_cache, prompt_cache
from .scored import Comparison, Scored, join, reduce
from .skipped import ContinuationSkips
from .variant import ScoredRow


class Job(LayerHook):
    """A forward whose z can be seen, block by block, while it passes a layer."""

    def __init__(self, engine: Engine, rows: Sequence[ScoredRow]) -> None:
        self._engine, self._skeleton = engine, engine.skeleton
        self._prunes = any(row.kept or row.skip for row in rows)
        self._layer = 0
        self._taps: list[Tap] = []

    def before(self, layer: int, states: Tensor | None) -> None:
        self._layer = layer
        if self._prunes:
            module, blocks = self._skeleton.modules[layer], self._skeleton.layers[layer].blocks
            self._taps = [Tap(module, block.path, partial(self.see, place)) for place, block in enumerate(blocks)]

    def positions(self, place: int, z: Tensor, tokens: Tensor | None) -> Tensor:
        """Of which tokens of the forward, counted through its rows, a z (..., F) of the block `place` is."""
        pieces = pieces_of(self._skeleton.modules[self._layer], self._skeleton.layers[self._layer].blocks[place].path)
        own = torch.arange(z.shape[:-1].numel(), device=z.device) if tokens is None else tokens
        return own + (pieces.begin if pieces else 0)

    def see(self, place: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
        """What goes on in the place of z (..., F) of the layer's block `place`; None: z itself."""
        raise NotImplementedError

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        self.close()

    def close(self) -> None:
        while self._taps:
            self._taps.pop().remove()


class PromptJob(Job):
    """A context, read by the full model, or by a static row's own pruned one: its KV cache, its last logits, and, of
    the layer at hand, the neurons that each of its rows drops. `numbers`: of the rows that continue it."""

    def __init__(self, engine: Engine, ids: Sequence[int], numbers: Sequence[int], rows: Sequence[ScoredRow]) -> None:
        self.ids, self.cache, self.numbers, self.rows = tuple(ids), prompt_cache(), numbers, rows
        super().__init__(engine, rows)
        self._logits = torch.empty(0)  # (1, V), of the last token
        self._statistics: list[Tensor] = []  # by block: (F,) or (E, F)
        self._dropped: dict[int, Tensor] = {}  # by block: (R, F) or (R, E, F), bool
        self._activations: dict[int, Activations] = {}  # by block, where a row folds

    def __call__(self) -> None:
        ids = torch.tensor([self.ids], device=self._engine.device)
        options = self._engine.opened.last_logits
        output = self._skeleton.model(ids, past_key_values=self.cache, use_cache=True, **options)
        self._logits = output.logits[0, -1:].clone()

    def predict(self, token: int, full: "PromptJob") -> Scored:
        """Scores (1,) of the first token after the prompt; `full`: the same prompt, read by the full model."""
        ours, theirs = (prompt._logits.float().log_softmax(-1) for prompt in (self, full))
        return join([reduce(ours, theirs, torch.tensor([token], device=ours.device))])

    def before(self, layer: int, states: Tensor | None) -> None:
        super().before(layer, states)
        shapes, device = [block.statistic_shape for block in self._skeleton.layers[layer].blocks], self._engine.device
        self._statistics = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes]
        self._dropped = {}
        if any(row.fold for row in self.rows):
            tokens = fold_tokens(torch.ones(1, len(self.ids), dtype=torch.int64, device=device))
            self._activations = {place: Activations(CountedTokens(tokens)) for place in range(len(shapes))}

    def activations(self, place: int, expert: int | None) -> Tensor | None:
        """Rows of a block's z at the layer at hand, (S, F), for the fold; None where there are none."""
        pieces = self._activations[place].pieces(expert)
        return joined(list(pieces)) if any(map(len, pieces)) else None

    def see(self, place: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
        """Adds z to the statistic, or zeroes what a static row drops."""
        if self.rows[0].static:
            (dropped,) = self.dropped(place)
            return z.masked_fill(dropped if expert is None else dropped[expert], 0)
        if self._activations:
            self._activations[place].add(z, self.positions(place, z, tokens), expert)
        total = self._statistics[place] if expert is None else self._statistics[place][expert]
        total += neuron_statistic(z)
        return None

    def dropped(self, place: int) -> Tensor:
        """The neurons of a block of the layer at hand that each row drops: (R, F) or (R, E, F), bool."""
        if place not in self._dropped:
            self._dropped[place] = self._choose(place)
        return self._dropped[place]

    def _choose(self, place: int) -> Tensor:
        block, statistic = self._skeleton.layers[self._layer].blocks[place], self._statistics[place]
        dense = {name: self._skeleton.modules[self._layer].get_parameter(name) for name in block.rows}
        dropped = torch.zeros((len(self.rows), *statistic.shape), dtype=torch.bool, device=statistic.device)
        known: dict[tuple[Selection, int], Tensor] = {}  # rows often differ in another layer
        for row, of_row in zip(dropped, self.rows, strict=True):
            kept = of_row.kept[self._layer][place] if of_row.kept else block.neurons
            if kept == block.neurons:
                continue
            choice = of_row.selection, kept
            if choice not in known:
                weights = partial(block_magnitude, block, dense)
                neurons = of_row.selection.choose(statistic, kept, self._layer, weights, place)
                known[choice] = row.fill_(True).scatter_(-1, neurons, False)
            row.copy_(known[choice])
        return dropped


class ContinuationJob(Job):
    """All tokens of a continuation but the last, read by R of a prompt's rows."""

    def __init__(
        self,
        engine: Engine,
        prompt: PromptJob,
        ids: Sequence[int],
        part: slice,
        comparison: Comparison,
        similarity: Tensor | None = None,
    ) -> None:
        """`part`: which of the prompt's rows; `similarity`: of the prompt, (P, L), where a row skips blocks."""
        super().__init__(engine, rows := prompt.rows[part])
        self.numbers, self.scored = prompt.numbers[part], list[Scored]()  # by row, all tokens after the first
        self._prompt, self._ids, self._part, self._comparison = prompt, ids, part, comparison
        self._skips: ContinuationSkips | None = None
        if any(row.skip for row in rows):
            assert similarity is not None
            self._skips = ContinuationSkips([(row.skip, row.ablation) for row in rows], len(ids) - 1, similarity)
        self._residual: Residual | None = None
        self._entering: Tensor | None = None
        self._skipping = torch.empty(0)  # (R, T), bool: who skips the block of the layer at hand

    def __call__(self) -> None:
        ids = torch.tensor([self._ids], device=self._engine.device)
        cache = forked_cache(self._prompt.cache, len(self._prompt.ids), len(self._skeleton.layers))
        rows = ids[:, :-1].expand(len(self.numbers), -1)
        logits = self._skeleton.model(rows, past_key_values=cache, use_cache=True).logits
        if self.numbers[0] == 0:  # the full model's, for all forwards over this continuation, which come next
            self._comparison.truth = logits[0].clone()
        self.scored = self._comparison(logits, ids[0, 1:])

    def before(self, layer: int, states: Tensor | None) -> None:
        super().before(layer, states)
        if self._skips and self._skeleton.layers[layer].blocks:
            self._residual, self._entering = Residual(self._skeleton.modules[layer]), states
            self._skipping = self._skips.at(self._skeleton.layout.block_layers.index(layer))

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        """Where a row skips whole layers, attention too, its states stay as they entered."""
        if self._skips and self._residual and self._entering is not None and states is not None:
            similarity = self._residual.similarity(states)
            self._skips.update(self._skeleton.layout.block_layers.index(layer), similarity)
            whole = self._skips.whole_layers
            states[whole] = self._entering[whole]
        self.close()

    def close(self) -> None:
        super().close()
        if self._residual:
            self._residual.remove()
        self._residual = self._entering = None

    def see(self, place: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor:
        """z with zeros for the neurons that its row drops, and for the tokens that skip the block."""
        dropped = self._prompt.dropped(place)[self._part]
        dropped = dropped if expert is None else dropped[:, expert]
        positions = self.positions(place, z, tokens)
        row_of = positions // (len(self._ids) - 1)
        absent = dropped[row_of]
        if self._skips:
            absent = absent | self._skipping.flatten()[positions, None]
        out = z.masked_fill(absent.view(z.shape), 0)
        self._fold(place, expert, out.view(-1, z.shape[-1]), row_of, dropped)
        return out

    def _fold(self, place: int, expert: int | None, z: Tensor, row_of: Tensor, dropped: Tensor) -> None:
        """Puts into z (N, F), for rows that fold, what the kept neurons say of the dropped ones (R, F)."""
        for number, row in enumerate(self._prompt.rows[self._part]):
            mine, absent = row_of == number, dropped[number]
            if row.fold and 0 < int(absent.sum()) < len(absent):
                rows = self._prompt.activations(place, expert)
                if rows is not None:
                    z[mine] += predicted(z[mine], rows, absent, row.fold).to(z.dtype)
