"""Log-likelihood of a continuation after a context, with the model pruned to that context (arXiv:2404.01365).

The context is the prompt: the full model reads it, and its neurons are chosen. The continuation is teacher-forced
through the kept neurons alone; its first token is predicted by the prompt's forward, thus by the full model.
Perplexity, multiple choice and lm-eval all stand on this.

C tokens of continuation, V vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import BudgetError, OptionError, PromptError
from ...memory.out_of_memory import planned
from ...offload.skip_by_prompt import check_skip
from ...options import AUTO, OnLayer
from ...planning.plan import make_plan
from ...planning.scoring import pair_holds
from .passage import Context, Passage
from .prompt_cache import can_fork
from .reads import plan_reads
from .scored import Comparison, Pair, Scored, join, progress_of
from .skipped import similarities
from .variant import FULL, ScoredRow, Variant

OnPair = Callable[[int, int], None]  # done, total


def score(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[Scored]]:
    """Scores of each pair under each variant: [pair][variant].

    One reading of the weights serves all variants, and as many pairs as the budget has room for. Neurons are zeroed
    rather than cut out, so that a model can be scored that would not fit; the engine is empty afterwards. Quantized
    variants, and models whose prompt leaves more than keys and values behind, are scored by `score_slowly`.
    on_layer(done, total) counts the layers of all readings.
    Raises PromptError for an empty context or continuation, or one beyond the model's context, OptionError,
    BudgetError, and what a sweep raises."""
    check_pairs(engine, pairs)
    forks = can_fork(engine.skeleton.config)
    _check_variants(engine, variants, forks)
    slow = [variant for variant in variants if variant.quantized or not forks]
    fast = [variant for variant in variants if variant not in slow]
    if refusals := [*_refusals(engine, pairs, fast), *_slow_refusals(engine, pairs, slow)]:
        raise max(refusals, key=lambda error: error.needed)
    found: dict[Variant, Sequence[Scored]] = {}  # by pair
    if fast and pairs:
        scored = _score_together(engine, pairs, fast, None if slow else on_pair, on_layer)
        found |= zip(fast, zip(*scored, strict=True), strict=True)
    if slow and pairs:
        scored = score_slowly(engine, pairs, slow, on_pair, on_layer)
        found |= zip(slow, zip(*scored, strict=True), strict=True)
    return [[found[variant][number] for variant in variants] for number in range(len(pairs))]


def _check_variants(engine: Engine, variants: Sequence[Variant], forks: bool) -> None:
    """Raises OptionError for what this model cannot be scored with."""
    if not forks and any(variant.skip.share or variant.static for variant in variants):
        raise OptionError(
            f"{engine.name} remembers more than keys and values: skipped blocks and static models cannot be scored"
        )
    for variant in variants:
        if variant.skip.share:
            check_skip(engine.skeleton.layout, variant.skip)
            if variant.quantized or variant.folds:
                raise OptionError(f"{variant.label()} cannot be scored: skip no blocks, or quantize and fold nothing")


def _score_together(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    on_pair: OnPair | None,
    on_layer: OnLayer | None,
) -> list[list[Scored]]:
    """As `score`: the full model's row, and one for each other variant."""
    pruned = _pruned(variants)
    if any(variant.prior == AUTO for variant in pruned):
        engine.prior()  # measured now, if it never was
    rows = [ScoredRow(), *(variant.row(engine) for variant in pruned)]
    places = {variant: place for place, variant in enumerate(pruned, 1)}
    found = score_rows(engine, pairs, rows, on_pair, on_layer)
    return [[scored[places.get(variant, 0)] for variant in variants] for scored in found]


def _pruned(variants: Sequence[Variant]) -> list[Variant]:
    return list(dict.fromkeys(variant for variant in variants if not variant.full))


def _refusals(engine: Engine, pairs: Sequence[Pair], variants: Sequence[Variant]) -> list[BudgetError]:
    """What does not fit of the largest reading, found before anything is read."""
    if not pairs or not variants:
        return []
    rows = [ScoredRow(), *(ScoredRow(static=variant.static, fold=variant.folds) for variant in _pruned(variants))]
    waiting, _ = plan_reads(engine, pairs, rows)[0]
    try:
        engine.plan_passage(max(len(context) for context, _ in pairs), waiting)
    except BudgetError as error:
        return [error]
    return []


def score_rows(
    engine: Engine,
    pairs: Sequence[Pair],
    rows: Sequence[ScoredRow],
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[Scored]]:
    """As `score`, by rows: [pair][row]. The first row is the full model; the model's cache is keys and values alone."""
    found: dict[int, list[Scored]] = {}
    similar = _similarities(engine, pairs) if any(row.skip for row in rows) else {}
    longest = max(len(context) for context, _ in pairs)
    reads = plan_reads(engine, pairs, rows)
    for number, (waiting, numbers) in enumerate(reads):
        _tell(on_pair, len(found), len(pairs))
        passage = Passage(engine, [pairs[n] for n in numbers], rows, similar)
        scored = passage.run(longest, waiting, progress_of(on_layer, number, len(reads)))
        found |= zip(numbers, scored, strict=True)
    _tell(on_pair, len(pairs), len(pairs))
    return [found[number] for number in range(len(pairs))]


def _similarities(engine: Engine, pairs: Sequence[Pair]) -> dict[Context, Tensor]:
    """Similarities (P, L) of the blocks at every context, for the rows that skip some: in readings of their own."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    found: dict[Context, Tensor] = {}
    for waiting, numbers in plan_reads(engine, [(list(context), [0]) for context in contexts], [ScoredRow()]):
        ours = [contexts[number] for number in numbers]
        found |= zip(ours, similarities(engine, ours, waiting), strict=True)
    return found


def score_slowly(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[Scored]]:
    """As `score`, with the pruned models themselves: a sweep for each pair and variant, and one for the full model, or
    a reading of it where it does not fit. What cannot be scored is refused by `score`.

    Holds the full model's logits of one pair at a time, (C, V)."""
    comparison = Comparison(engine.sizes.vocabulary, engine.device)
    scored = []
    for done, (context, continuation) in enumerate(pairs):
        _tell(on_pair, done, len(pairs))
        scored.append(_score_pair(engine, context, continuation, variants, comparison, on_layer))
    _tell(on_pair, len(pairs), len(pairs))
    return scored


def _slow_refusals(engine: Engine, pairs: Sequence[Pair], variants: Sequence[Variant]) -> list[BudgetError]:
    """What does not fit of the largest pair, found before anything is read. Raises OptionError."""
    if not pairs:
        return []
    context, following = (max(map(len, part)) for part in zip(*pairs, strict=True))
    refusals = []
    for variant in variants:
        variant.plan(engine, 1, 1)  # raises OptionError
        try:
            engine.opened.plan(context, following, variant, beside=pair_holds(engine.sizes, context, following))
        except BudgetError as error:
            refusals.append(error)
    if not _full_fits(engine, context, following):
        try:
            engine.plan_passage(context + following, pair_holds(engine.sizes, context, following))
        except BudgetError as error:
            refusals.append(error)
    return refusals


def _full_fits(engine: Engine, context: int, following: int) -> bool:
    """Whether the full model can stay in memory while a pair is scored."""
    request = engine.opened.request(context, following)
    return make_plan(engine.sizes, replace(request, beside=pair_holds(engine.sizes, context, following))).fits


def check_pairs(engine: Engine, pairs: Sequence[Pair]) -> None:
    """Raises PromptError for the first pair that cannot be scored, before anything is read."""
    for number, (context, continuation) in enumerate(pairs, 1):
        if not context:
            raise PromptError(f"text {number} has no context: neurons are chosen by a prompt of at least one token")
        if not continuation:
            raise PromptError(f"text {number} has nothing after its context to score")
        if (tokens := len(context) + len(continuation)) > engine.context_length:
            raise PromptError(
                f"text {number} has {tokens} tokens with its context; "
                f"{engine.name} reads at most {engine.context_length}"
            )


def _score_pair(
    engine: Engine,
    context: list[int],
    continuation: list[int],
    variants: Sequence[Variant],
    comparison: Comparison,
    on_layer: OnLayer | None,
) -> list[Scored]:
    following = torch.tensor(continuation, device=engine.device)
    truth = _full_logits(engine, context, continuation, on_layer)  # first: it may still be resident
    parts = slice(0, 1), slice(1, None)  # each part's logits come by a forward of its own

    def compared(first: Tensor, others: Tensor) -> Scored:
        scored = []
        for part, logits in zip(parts, (first, others), strict=True):
            comparison.truth = truth[part]
            scored += comparison(logits[None], following[part]) if len(logits) else []
        return join(scored)

    full = compared(truth[:1], truth[1:])
    return [
        full
        if variant.full or len(continuation) == 1  # the first token is the full model's in any case
        else compared(*_logits(engine, context, continuation, variant, on_layer))
        for variant in variants
    ]


@torch.no_grad()
def _full_logits(engine: Engine, context: list[int], continuation: list[int], on_layer: OnLayer | None) -> Tensor:
    """The full model's logits (C, V) of the continuation."""
    if _full_fits(engine, len(context), len(continuation)):
        return torch.cat(_logits(engine, context, continuation, FULL, on_layer))
    ids = [*context, *continuation[:-1]]
    holds = pair_holds(engine.sizes, len(context), len(continuation))
    read = partial(
        engine.skeleton.model,
        torch.tensor([ids], device=engine.device),
        use_cache=False,
        logits_to_keep=len(continuation),
    )
    with engine.passage(len(ids), holds, on_layer) as lockstep:
        (output,) = lockstep.run([read])
    logits: Tensor = output.logits[0]
    return logits


@torch.no_grad()
def _logits(
    engine: Engine, context: list[int], continuation: list[int], variant: Variant, on_layer: OnLayer | None
) -> tuple[Tensor, Tensor]:
    """Logits (1, V) of the continuation's first token, by the prompt's forward, and (C - 1, V) of the others."""
    holds = pair_holds(engine.sizes, len(context), len(continuation))
    output = engine.sweep(context, variant, len(continuation), seed=variant.seed, beside=holds, on_layer=on_layer)
    first: Tensor = output.logits[0, -1:]
    if len(continuation) == 1:
        return first, first[:0]
    rest = torch.tensor([continuation[:-1]], device=engine.device)
    with planned(engine.device, unload=engine.unload):
        after = engine.skeleton.model(rest, past_key_values=output.past_key_values, use_cache=True).logits[0]
    return first, after


def _tell(on_pair: OnPair | None, done: int, total: int) -> None:
    if on_pair:
        on_pair(done, total)
