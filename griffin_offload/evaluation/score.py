"""Log-likelihood of a continuation after a context, with the model pruned to that context (arXiv:2404.01365).

The context is the prompt: it goes through the full model, and its experts are chosen. The continuation is
teacher-forced through the experts only. Its first token is predicted from the prompt pass, thus by the full model.
Perplexity, multiple choice and lm-eval all stand on this.

C tokens of continuation, T = C - 1 of them read; R rows: the full model, then each way of pruning; F neurons,
E routed experts, V vocabulary."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocation import calibration_path, checkpoint_key, load_curves
from ..engine import Engine
from ..errors import OptionError, PromptError
from ..hooks import Tap
from ..models import cache_folder
from ..plan import Kept, Plan, make_plan
from ..prefill import OnLayer, block_magnitude
from ..selection import Selection, check_sparsity
from ..statistic import neuron_statistic
from ..units import KIB, MIB
from .branch import branch, can_branch, prompt_cache

LOGITS = 256 * MIB  # at most, of one forward: it has as many rows as that allows
POSITIONS = 32  # of the logits in float32 at a time
STACK = 64 * KIB  # of one forward that waits (measured)
Row = tuple[Selection, Kept] | None  # of a batch: how its experts are chosen, and how many; None: the full model
Pair = tuple[list[int], list[int]]  # token ids of a context, and of its continuation
OnPair = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Variant:
    """One way of pruning. `sparsity`: of every layer, or of each; 0 is the full model, whatever the rest says.

    Raises OptionError for a sparsity out of range or an unknown selection."""

    sparsity: float | tuple[float, ...] = 0.5
    selection: str = "topk"
    allocation: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for share in self._layers:
            check_sparsity(share)
        Selection(self.selection, self.seed)

    @property
    def full(self) -> bool:
        return not any(self._layers)

    @property
    def draws(self) -> bool:
        return self.selection not in ("topk", "magnitude")

    @property
    def shares(self) -> float | list[float]:
        """The sparsity as Engine takes it."""
        return list(self.sparsity) if isinstance(self.sparsity, tuple) else self.sparsity

    @property
    def _layers(self) -> tuple[float, ...]:
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    def label(self) -> str:
        """Short and for people: 'full', '50%', '50% random seed 1 sensitivity'. Defaults are left out."""
        if self.full:
            return "full"
        words = [f"{100 * sum(self._layers) / len(self._layers):.4g}%"]
        words += ["by layer"] if isinstance(self.sparsity, tuple) else []
        words += [self.selection] if self.selection != "topk" else []
        words += [f"seed {self.seed}"] if self.seed and self.draws else []
        words += [self.allocation] if self.allocation != "uniform" else []
        return " ".join(words)

    def plan(self, engine: Engine, prompt_tokens: int, max_new_tokens: int) -> Plan:
        """What such a run would hold, whether or not it fits. Raises OptionError for 'sensitivity' of what is not
        calibrated: an answer may do with 'uniform' instead, but a measurement would bear a wrong name."""
        if self.allocation == "sensitivity" and not self.full and not _is_calibrated(engine):
            raise OptionError(
                f"{engine.name} is not calibrated: run `griffin calibrate` once, or leave out allocation 'sensitivity'"
            )
        request = engine._request(prompt_tokens, max_new_tokens)
        return make_plan(engine.sizes, replace(request, sparsity=self.sparsity, share=engine._share(self.allocation)))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Engine.sweep` and `Engine.generate`, besides the sparsity.

        The seed only where the selection draws, since `generate` would draw tokens by it too."""
        seed = {"seed": self.seed} if self.draws else {}
        return {"selection": self.selection, "allocation": self.allocation, **seed}


FULL = Variant(0.0)


def _is_calibrated(engine: Engine) -> bool:
    return load_curves(calibration_path(cache_folder(), checkpoint_key(engine.checkpoint))) is not None


@dataclass(frozen=True)
class Scored:
    """Of one continuation, token by token (C,). `log_probability`: of the true token, nats, float32;
    `greedy`: the true token is the variant's most likely one; `agrees`: the variant's most likely token is the full
    model's; `kl`: divergence of the variant's distribution from the full model's, KL(full || variant), nats, float32.
    """

    log_probability: Tensor
    greedy: Tensor
    agrees: Tensor
    kl: Tensor


def all_variants(
    sparsities: Sequence[float], selections: Sequence[str], allocations: Sequence[str], seed: int = 0
) -> list[Variant]:
    """Every combination, in this order; sparsity 0 once: it is the full model with all of them."""
    product = [Variant(s, how, where, seed) for s in sparsities for how in selections for where in allocations]
    return list(dict.fromkeys(FULL if variant.full else variant for variant in product))


def score(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[Scored]]:
    """Each pair under each variant: [pair][variant].

    One read of the weights serves all variants, and as many pairs as the budget has room for. Neurons are not cut out
    but zeroed, so that a model is scored that would not fit; the engine is empty after it. Where a prompt leaves more
    than keys and values behind, by `score_slowly`. on_layer(done, total) counts the layers of all reads.
    Raises PromptError for an empty context or continuation, or one beyond the model's context, OptionError,
    BudgetError, and what a sweep raises."""
    check_pairs(engine, pairs)
    if not can_branch(engine.config):
        return score_slowly(engine, pairs, variants, on_pair, on_layer)
    pruned = list(dict.fromkeys(variant for variant in variants if not variant.full))
    chosen = [Selection(variant.selection, variant.seed) for variant in pruned]
    rows: list[Row] = [None, *zip(chosen, (variant.plan(engine, 1, 1).kept for variant in pruned), strict=True)]
    if not pairs or not variants:
        return [[] for _ in pairs]
    row_of = {variant: number for number, variant in enumerate(pruned, 1)}  # a full one's is 0
    found: dict[int, list[Scored]] = {}
    passages = _passages(engine, pairs, rows)
    for done, (waiting, numbers) in enumerate(passages):

        def tell_layer(layer: int, count: int, before: int = done) -> None:
            if on_layer:
                on_layer(before * count + layer, len(passages) * count)

        _tell(on_pair, len(found), len(pairs))
        passing = _Passage(engine, [pairs[number] for number in numbers], rows)
        found |= zip(numbers, passing.run(max(len(context) for context, _ in pairs), waiting, tell_layer), strict=True)
    _tell(on_pair, len(pairs), len(pairs))
    return [[found[number][row_of.get(variant, 0)] for variant in variants] for number in range(len(pairs))]


def score_slowly(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[Scored]]:
    """As `score`, by a sweep for each pair and variant, and one for the full model: the pruned models themselves.

    Of one pair at a time the full model's log-probabilities are held, (C, V), float32."""
    check_pairs(engine, pairs)
    for variant in variants if pairs else ():  # what cannot be planned is refused before anything is read
        variant.plan(engine, 1, 1)
        tokens = max(len(context) for context, _ in pairs), max(len(after) for _, after in pairs)
        engine.plan(*tokens, variant.shares, allocation=variant.allocation)
    scored = []
    for done, (context, continuation) in enumerate(pairs):
        _tell(on_pair, done, len(pairs))
        scored.append(_score_pair(engine, context, continuation, variants, on_layer))
    _tell(on_pair, len(pairs), len(pairs))
    return scored


def check_pairs(engine: Engine, pairs: Sequence[Pair]) -> None:
    """Raises PromptError for the first pair that cannot be scored: before anything is read."""
    for number, (context, continuation) in enumerate(pairs, 1):
        if not context:
            raise PromptError(f"text {number} has no context: experts are chosen by a prompt of at least one token")
        if not continuation:
            raise PromptError(f"text {number} has nothing after its context to score")
        if (tokens := len(context) + len(continuation)) > engine.context_length:
            raise PromptError(
                f"text {number} has {tokens} tokens with its context; "
                f"{engine.name} reads at most {engine.context_length}"
            )


def _passages(engine: Engine, pairs: Sequence[Pair], rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """Which pairs (numbers) share a read of the weights, and the bytes that they hold meanwhile.

    Pairs of one context are neighbours, so that it is read once, or once a passage. The largest passage is the first:
    what does not fit is refused before anything is read."""
    context = max(len(context) for context, _ in pairs)
    request = replace(engine._request(context, 1), export=True)
    room = engine.budget - make_plan(engine.sizes, request).peak
    running = max(_running(engine, pair, rows) for pair in pairs)
    passages: list[tuple[int, list[int]]] = []
    before: list[int] = []
    for number in _neighbours(pairs):
        prompt, following = _waiting(engine, pairs[number], rows)
        more = following if pairs[number][0] == before else prompt + following
        if passages and passages[-1][0] + more <= room:
            held, numbers = passages[-1]
            numbers.append(number)
            passages[-1] = held + more, numbers
        else:
            passages.append((running + prompt + following, [number]))
        before = pairs[number][0]
    return sorted(passages, reverse=True)


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
    forwards = -(-len(rows) // _rows_at_once(engine, after)) if after else 0
    following = len(rows) * after * (row + (prompt + after) * mask)
    return STACK + prompt * (row + prompt * mask) + experts + left, forwards * STACK + following


def _running(engine: Engine, pair: Pair, rows: Sequence[Row]) -> int:
    """Bytes that one forward over a pair's continuation needs in a layer, or for its logits and what they come to."""
    sizes, following = engine.sizes, len(pair[1]) - 1
    together = min(len(rows), _rows_at_once(engine, following))
    logits = (together + 2) * following * sizes.vocabulary * sizes.item + 8 * POSITIONS * sizes.vocabulary * 4
    return logits + sizes.activations(len(pair[0]) + following, together)


def _rows_at_once(engine: Engine, following: int) -> int:
    return max(1, LOGITS // max(1, following * engine.sizes.vocabulary * engine.sizes.item))


class _Passage:
    """Pairs over one read of the weights: for every context a forward, then one or more for each continuation."""

    def __init__(self, engine: Engine, pairs: Sequence[Pair], rows: Sequence[Row]) -> None:
        self.engine, self.rows = engine, rows
        self.truth = torch.empty(0)  # the full model's logits (T, V) of the continuation whose forwards end now
        self._pairs = pairs

    def run(self, tokens: int, waiting: int, on_layer: OnLayer) -> list[list[Scored]]:
        """By pair and row. `tokens`, `waiting`: as Engine.passage has them."""
        prompts: dict[tuple[int, ...], _Prompt] = {}
        jobs: list[_Prompt | _Following] = []
        places = []  # among the jobs, of each pair's
        for context, continuation in self._pairs:
            if tuple(context) not in prompts:
                prompts[tuple(context)] = _Prompt(self, context)
                jobs.append(prompts[tuple(context)])
            begin = len(jobs)
            together = _rows_at_once(self.engine, len(continuation) - 1)
            if len(continuation) > 1:
                for first in range(0, len(self.rows), together):
                    which = slice(first, min(first + together, len(self.rows)))
                    jobs.append(_Following(self, prompts[tuple(context)], continuation, which))
            places.append(slice(begin, len(jobs)))

        def watch(layer: int, block: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
            return jobs[passage.job].watch(layer, block, z, tokens, expert)

        with ExitStack() as stack:
            passage = stack.enter_context(self.engine.passage(tokens, waiting, on_layer))
            for index, layer in enumerate(self.engine.skeleton.layers if len(self.rows) > 1 else ()):
                for number, block in enumerate(layer.blocks):
                    stack.callback(Tap(layer.module, block.path, partial(watch, index, number)).remove)
            results = passage.run(jobs)
        scored = []
        for (context, continuation), place in zip(self._pairs, places, strict=True):
            head = prompts[tuple(context)].predict(continuation[0])
            rest = [of_row for of_job in results[place] for of_row in of_job]
            scored.append([_join([head, of_row]) for of_row in rest] or [head] * len(self.rows))
        return scored


class _Prompt:
    """The context by the full model: its keys and values, what it predicts, and what each row drops of the layer at
    hand."""

    def __init__(self, passage: _Passage, ids: Sequence[int]) -> None:
        self.tokens, self.cache = len(ids), prompt_cache()
        self._passage, self._ids = passage, ids
        self._logits = torch.empty(0)  # (1, V), of the last token
        self._layer = -1
        self._statistics: dict[int, Tensor] = {}  # by block: (F,) or (E, F)
        self._dropped: dict[int, Tensor] = {}  # by block: (R, F) or (R, E, F), bool

    def __call__(self) -> list[Scored]:
        engine = self._passage.engine
        ids = torch.tensor([self._ids], device=engine.device)
        output = engine.skeleton.model(ids, past_key_values=self.cache, use_cache=True, **engine._last_logits)
        self._logits = output.logits[0, -1:].clone()
        return []

    def predict(self, token: int) -> Scored:
        """Of the first token after it, (1,): the full model's in any case."""
        logits = self._logits.float().log_softmax(-1)
        return _join([_reduce(logits, logits, torch.tensor([token], device=logits.device))])

    def watch(self, layer: int, block: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> None:
        if layer != self._layer:
            self._layer, self._statistics, self._dropped = layer, {}, {}
        if block not in self._statistics:
            shape = self._passage.engine.skeleton.layers[layer].blocks[block].statistic_shape
            self._statistics[block] = torch.zeros(shape, dtype=torch.float32, device=z.device)
        total = self._statistics[block] if expert is None else self._statistics[block][expert]
        total += neuron_statistic(z)

    def dropped(self, block: int) -> Tensor:
        """What is no expert of the layer at hand, for every row."""
        if block not in self._dropped:
            statistic, layer = self._statistics[block], self._passage.engine.skeleton.layers[self._layer]
            neurons = layer.blocks[block]
            dense = {name: layer.module.get_parameter(name) for name in neurons.rows}
            dropped = torch.zeros(
                (len(self._passage.rows), *statistic.shape), dtype=torch.bool, device=statistic.device
            )
            for row, of_row in zip(dropped, self._passage.rows, strict=True):
                if of_row is None or (kept := of_row[1][self._layer][block]) == neurons.neurons:
                    continue
                experts = of_row[0].choose(statistic, kept, self._layer, partial(block_magnitude, neurons, dense))
                row.fill_(True).scatter_(-1, experts, False)
            self._dropped[block] = dropped
        return self._dropped[block]


class _Following:
    """A continuation, but for its last token, by some of the rows."""

    def __init__(self, passage: _Passage, prompt: _Prompt, ids: Sequence[int], rows: slice) -> None:
        self._passage, self._prompt, self._ids, self._rows = passage, prompt, ids, rows

    def __call__(self) -> list[Scored]:
        """By row, all tokens after the first."""
        engine, prompt = self._passage.engine, self._prompt
        ids = torch.tensor([self._ids], device=engine.device)
        cache = branch(prompt.cache, prompt.tokens, len(engine.skeleton.layers))
        rows = ids[:, :-1].expand(self._rows.stop - self._rows.start, -1)
        logits = engine.skeleton.model(rows, past_key_values=cache, use_cache=True).logits
        if self._rows.start == 0:
            self._passage.truth = logits[0].clone()  # for the forwards of the other rows, which end next
        return _compare(logits, self._passage.truth, ids[0, 1:])

    def watch(self, layer: int, block: int, z: Tensor, tokens: Tensor | None, expert: int | None) -> Tensor | None:
        dropped = self._prompt.dropped(block)[self._rows]
        dropped = dropped if expert is None else dropped[:, expert]
        skeleton = self._passage.engine.skeleton
        pieces = skeleton.pieces_of(skeleton.layers[layer], skeleton.layers[layer].blocks[block])
        places = torch.arange(z.shape[:-1].numel(), device=z.device) if tokens is None else tokens
        rows = (places + (pieces.begin if pieces else 0)) // (len(self._ids) - 1)  # of the batch: one for each z
        return z.masked_fill(dropped[rows].view(z.shape), 0)


def _compare(logits: Tensor, truth: Tensor, following: Tensor) -> list[Scored]:
    """Logits (R, T, V) beside the full model's (T, V), a few places at a time; the true tokens (T,)."""
    rows: list[list[Scored]] = [[] for _ in logits]
    for begin in range(0, len(truth), POSITIONS):
        part = slice(begin, begin + POSITIONS)
        theirs = truth[part].float().log_softmax(-1)
        for row, ours in zip(rows, logits, strict=True):
            row.append(_reduce(ours[part].float().log_softmax(-1), theirs, following[part]))
    return [_join(row) for row in rows]


def _join(parts: Sequence[Scored]) -> Scored:
    """One behind the other, on the CPU."""
    names = [field.name for field in fields(Scored)]
    return Scored(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in names))


def _score_pair(
    engine: Engine, context: list[int], continuation: list[int], variants: Sequence[Variant], on_layer: OnLayer | None
) -> list[Scored]:
    following = torch.tensor(continuation)
    truth = _log_probabilities(engine, context, continuation, FULL, on_layer)  # first: it may still be resident
    full = _reduce(truth, truth, following)
    scored = []
    for variant in variants:
        if variant.full or len(continuation) == 1:  # the first token is the full model's in any case
            scored.append(full)
        else:
            ours = _log_probabilities(engine, context, continuation, variant, on_layer)
            scored.append(_reduce(ours, truth, following))
    return scored


@torch.no_grad()
def _log_probabilities(
    engine: Engine, context: list[int], continuation: list[int], variant: Variant, on_layer: OnLayer | None
) -> Tensor:
    """Of every token at every place of the continuation: (C, V), float32, on the CPU."""
    output = engine.sweep(context, variant.shares, len(continuation), on_layer=on_layer, **variant.options())
    logits: Tensor = output.logits[0, -1:]
    if len(continuation) > 1:
        rest = torch.tensor([continuation[:-1]], device=engine.device)
        after = engine.skeleton.model(rest, past_key_values=output.past_key_values, use_cache=True).logits[0]
        logits = torch.cat([logits, after])
    return logits.float().cpu().log_softmax(-1)


def _reduce(ours: Tensor, truth: Tensor, following: Tensor) -> Scored:
    """Log-probabilities of the variant and of the full model, each (C, V), and the true tokens, (C,)."""
    best = ours.argmax(-1)
    return Scored(
        log_probability=ours.gather(1, following[:, None])[:, 0],
        greedy=best == following,
        agrees=best == truth.argmax(-1),
        kl=(truth.exp() * (truth - ours)).sum(-1),
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: 0 for a single value, which has no spread."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, (variance / len(values)) ** 0.5


def _tell(on_pair: OnPair | None, done: int, total: int) -> None:
    if on_pair:
        on_pair(done, total)
