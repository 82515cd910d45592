"""Log-likelihood of a continuation after a context, with the model pruned to that context (arXiv:2404.01365).

The context is the prompt: it goes through the full model, and its experts are chosen. The continuation is
teacher-forced through the experts only. Its first token is predicted from the prompt pass, thus by the full model.
Perplexity, multiple choice and lm-eval all stand on this.

C tokens of continuation, V vocabulary."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import OptionError, PromptError
from ...offload.skip_by_prompt import check_skip
from ...options import OnLayer
from .passage import Passage, Row, passages
from .prompt_cache import can_branch
from .scored import Pair, Scored, reduce
from .skipped import similarities
from .variant import FULL, Variant

OnPair = Callable[[int, int], None]  # done, total


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
    than keys and values behind, and for packed variants, by `score_slowly`. on_layer(done, total) counts the layers of
    all reads.
    Raises PromptError for an empty context or continuation, or one beyond the model's context, OptionError,
    BudgetError, and what a sweep raises."""
    check_pairs(engine, pairs)
    if not can_branch(engine.skeleton.config):
        if any(variant.skip or variant.static for variant in variants):
            raise OptionError(
                f"{engine.name} remembers more than keys and values: skipped blocks and static models cannot be scored"
            )
        return score_slowly(engine, pairs, variants, on_pair, on_layer)
    for variant in variants:
        if variant.skip:
            check_skip(engine.skeleton.layout, variant.skip)
    packed = [variant for variant in variants if variant.quantized]
    if packed:
        plain = [variant for variant in variants if not variant.quantized]
        first = score(engine, pairs, plain, None, on_layer) if plain else [[] for _ in pairs]
        second = score_slowly(engine, pairs, packed, on_pair, on_layer)
        return [
            [dict(zip([*plain, *packed], [*one, *other], strict=True))[variant] for variant in variants]
            for one, other in zip(first, second, strict=True)
        ]
    pruned = list(dict.fromkeys(variant for variant in variants if not variant.full))
    rows = [Row(), *(variant.row(engine) for variant in pruned)]
    if not pairs or not variants:
        return [[] for _ in pairs]
    row_of = {variant: number for number, variant in enumerate(pruned, 1)}  # a full one's is 0
    found = score_rows(engine, pairs, rows, on_pair, on_layer)
    return [[scored[row_of.get(variant, 0)] for variant in variants] for scored in found]


def score_rows(
    engine: Engine,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[Scored]]:
    """As `score`, of a model that leaves keys and values alone behind: [pair][row]. The first row is the full model."""
    found: dict[int, list[Scored]] = {}
    similar = _similarities(engine, pairs) if any(row.skip for row in rows) else {}
    reads = passages(engine, pairs, rows)
    for done, (waiting, numbers) in enumerate(reads):

        def tell_layer(layer: int, count: int, before: int = done) -> None:
            if on_layer:
                on_layer(before * count + layer, len(reads) * count)

        _tell(on_pair, len(found), len(pairs))
        passing = Passage(engine, [pairs[number] for number in numbers], rows, similar)
        found |= zip(numbers, passing.run(max(len(context) for context, _ in pairs), waiting, tell_layer), strict=True)
    _tell(on_pair, len(pairs), len(pairs))
    return [found[number] for number in range(len(pairs))]


def _similarities(engine: Engine, pairs: Sequence[Pair]) -> dict[tuple[int, ...], Tensor]:
    """Of every context's blocks, for the rows that skip some, by readings of their own."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    found: dict[tuple[int, ...], Tensor] = {}
    for waiting, numbers in passages(engine, [(list(context), [0]) for context in contexts], [Row()]):
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
    """As `score`, by a sweep for each pair and variant, and one for the full model: the pruned models themselves.

    Of one pair at a time the full model's log-probabilities are held, (C, V), float32."""
    check_pairs(engine, pairs)
    for variant in variants if pairs else ():  # what cannot be planned is refused before anything is read
        variant.plan(engine, 1, 1)
        tokens = max(len(context) for context, _ in pairs), max(len(after) for _, after in pairs)
        engine.plan(*tokens, sparsity=variant.shares, **variant.plan_options())
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
    """Of every token at every place of the continuation: (C, V), float32, on the CPU."""
    output = engine.sweep(
        context, None, len(continuation), on_layer=on_layer, sparsity=variant.shares, **variant.options()
    )
    logits: Tensor = output.logits[0, -1:]
    if len(continuation) > 1:
        rest = torch.tensor([continuation[:-1]], device=engine.device)
        after = engine.skeleton.model(rest, past_key_values=output.past_key_values, use_cache=True).logits[0]
        logits = torch.cat([logits, after])
    return logits.float().cpu().log_softmax(-1)


def _tell(on_pair: OnPair | None, done: int, total: int) -> None:
    if on_pair:
        on_pair(done, total)
