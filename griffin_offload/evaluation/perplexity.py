"""Perplexity of a continuation after a prompt (arXiv:2404.01365, figure 5): the prompt by the full model, the
continuation by the experts that the prompt chose, both teacher-forced."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engine import Engine
from ..errors import OptionError, PromptError
from ..options import OnLayer
from .scoring.score import OnPair, score
from .scoring.scored import Pair, Scored, mean_and_error
from .scoring.variant import Variant


@dataclass(frozen=True)
class Perplexity:
    """Of one variant, over all continuation tokens of all windows.

    `perplexity`: exp of the mean negative log-likelihood; `standard_error` of that mean over windows (nats; 0 for one
    window); `agreement`: share of places with the full model's most likely token; `kl`: mean KL(full || variant),
    nats; `resident_bytes` after the prompt, and `kept` neurons of every layer."""

    prompt_tokens: int
    continue_tokens: int
    label: str
    sparsity: float | tuple[float, ...]
    selection: str
    allocation: str
    resident_dtype: str
    rest: str
    seed: int
    prior_weight: float
    perplexity: float
    standard_error: float
    agreement: float
    kl: float
    resident_bytes: int
    kept: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def encode_text(engine: Engine, text: str, *, bos: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a whole text, without special ones, and what stands before every prompt: nothing, or with `bos`
    the model's first token. Raises OptionError where the model has none."""
    if bos and engine.tokenizer.bos_token_id is None:
        raise OptionError(f"{engine.name} has no token that begins a text: leave out --bos")
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids), [engine.tokenizer.bos_token_id] if bos else []


def windows(ids: Sequence[int], prompt: int, following: int, count: int) -> list[Pair]:
    """`count` runs of prompt + following tokens, one behind the other. Raises PromptError for too short a text."""
    size = prompt + following
    if len(ids) < size * count:
        raise PromptError(f"the text has {len(ids)} tokens; {count} windows of {size} need {size * count}")
    starts = range(0, size * count, size)
    return [(list(ids[i : i + prompt]), list(ids[i + prompt : i + size])) for i in starts]


def perplexity(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    *,
    prompt_tokens: Sequence[int],
    continue_tokens: Sequence[int],
    before: Sequence[int] = (),
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[Perplexity]:
    """Every prompt length by every continuation length by every variant, in this order.

    The places scored are the same for all: a shorter prompt is the last part of a window's, so that it ends at the
    same place, and a shorter continuation is the first part. `before`: tokens put before every prompt, uncounted."""
    results = []
    longest = max(continue_tokens)
    for prompt in prompt_tokens:
        cut = [([*before, *context[-prompt:]], continuation[:longest]) for context, continuation in pairs]
        scored = score(engine, cut, variants, on_pair, on_layer)
        for following in continue_tokens:
            for index, variant in enumerate(variants):
                ours = [of_pair[index] for of_pair in scored]
                results.append(_summarise(engine, ours, variant, prompt, following, len(before)))
    return results


def _summarise(
    engine: Engine, scored: Sequence[Scored], variant: Variant, prompt: int, following: int, before: int
) -> Perplexity:
    """The means over windows of which `following` tokens count each."""
    losses = [-one.log_probability[:following].mean().item() for one in scored]
    loss, error = mean_and_error(losses)
    agreement, _ = mean_and_error([one.agrees[:following].float().mean().item() for one in scored])
    kl, _ = mean_and_error([one.kl[:following].mean().item() for one in scored])
    plan = variant.plan(engine, prompt + before, following)
    return Perplexity(
        prompt_tokens=prompt,
        continue_tokens=following,
        label=variant.label(),
        sparsity=variant.sparsity,
        selection=variant.selection,
        allocation=variant.allocation,
        resident_dtype=variant.resident_dtype,
        rest=variant.rest,
        seed=variant.seed,
        prior_weight=variant.prior_weight if variant.prior else 0.0,
        perplexity=math.exp(loss),
        standard_error=error,
        agreement=agreement,
        kl=kl,
        resident_bytes=plan.resident_bytes,
        kept=tuple(layer.kept for layer in plan.layers),
    )
