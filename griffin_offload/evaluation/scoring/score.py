"""Log-likelihood of a continuation after a context, with the model pruned to that context (arXiv:2404.01365).

The context is the prompt: the full model reads it, and its neurons are chosen. The continuation is teacher-forced
through the kept neurons alone; its first token is predicted by the prompt's forward, thus by the full model.
Perplexity, multiple choice and lm-eval all stand on this.

C tokens of continuation, V vocabulary."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import OptionError, PromptError
from ...memory.out_of_memory import planned
from ...offload.skip_by_prompt import check_skip
from ...options import AUTO, OnLayer
from .passage import Context, Passage
from .prompt_cache import can_fork
from .reads import plan_reads
from .scored import Pair, Scored, progress_of, reduce
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
    pruned = list(dict.fromkeys(variant for variant in variants if not variant.full))
    if any(variant.prior == AUTO for variant in pruned):
        engine.prior()  # measured now, if it never was
    rows = [ScoredRow(), *(variant.row(engine) for variant in pruned)]
    places = {variant: place for place, variant in enumerate(pruned, 1)}
    found = score_rows(engine, pairs, rows, on_pair, on_layer)
    return [[scored[places.get(variant, 0)] for variant in variants] for scored in found]


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
    """As `score`, with the pruned models themselves: a sweep for each pair and variant, and one for the full model.

    Holds the full model's log-probabilities of one pair at a time, (C, V), float32."""
    check_pairs(engine, pairs)
    for variant in variants if pairs else ():  # what cannot be planned is refused before anything is read
        variant.plan(engine, 1, 1)
        tokens = max(len(context) for context, _ in pairs), max(len(after) for _, after in pairs)
        engine.plan(*tokens, variant)
    scored = []
    for done, (context, continuation) in enumerate(pairs):
        _tell(on_pair, done, len(pairs))
        scored.append(_score_pair(engine, context, continuation, variants, on_layer))
    _tell(on_pair, len(pairs), len(pairs))
    return scored


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
    engine: Engine, context: list[int], continuation: list[int], variants: Sequence[Variant], on_layer: OnLayer | None
) -> list[Scored]:
    following = torch.tensor(continuation)
    truth = _log_probabilities(engine, context, continuation, FULL, on_layer)  # first: it may still be resident
    full = reduce(truth, truth, following)
    scored = []
    for variant in variants:
        if variant.full or len(continuation) == 1:  # the first token is the full model's in any case
            scored.append(full)
        else:
            ours = _log_probabilities(engine, context, continuation, variant, on_layer)
            scored.append(reduce(ours, truth, following))
    return scored


@torch.no_grad()
def _log_probabilities(
    engine: Engine, context: list[int], continuation: list[int], variant: Variant, on_layer: OnLayer | None
) -> Tensor:
    """Log-probability of every token at every place of the continuation: (C, V), float32, on the CPU."""
    output = engine.sweep(context, variant, len(continuation), seed=variant.seed, on_layer=on_layer)
    logits: Tensor = output.logits[0, -1:]
    if len(continuation) > 1:
        rest = torch.tensor([continuation[:-1]], device=engine.device)
        with planned(engine.device, unload=engine.unload):
            after = engine.skeleton.model(rest, past_key_values=output.past_key_values, use_cache=True).logits[0]
        logits = torch.cat([logits, after])
    return logits.float().cpu().log_softmax(-1)


def _tell(on_pair: OnPair | None, done: int, total: int) -> None:
    if on_pair:
        on_pair(done, total)
