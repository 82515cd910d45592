"""Perplexity of a continuation after a prompt (arXiv:2404.01365, figure 5): the full model reads the prompt, the
neurons that the prompt chose read the continuation, both teacher-forced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine import Engine
from ..errors import OptionError, PromptError
from ..model.long_texts import first_tokens
from ..options import OnLayer
from .scoring.score import OnPair, score
from .scoring.scored import Pair, Scored, mean_and_error
from .scoring.variant import Variant

VARIANT = ("sparsity", "selection", "allocation", "resident_dtype", "rest", "seed", "prior_weight", "folds")
NUMBERS = (
    "perplexity",
    "standard_error",
    "agreement",
    "kl",
    "acceptance",
    "acceptance_error",
    "resident_bytes",
    "kept",
)


@dataclass(frozen=True)
class Perplexity:
    """Results of one variant, over all continuation tokens of all windows.

    `perplexity`: exp of the mean negative log-likelihood; `standard_error`: of that mean, over windows (nats; 0 for one
    window); `agreement`: share of tokens where the variant's likeliest token is the full model's; `kl`: mean
    KL(full || variant), nats; `acceptance`: mean of Σ min(p, q) of both, and its standard error over windows;
    `resident_bytes`: of the weights after the prompt; `kept`: neurons of every layer."""

    variant: Variant
    prompt_tokens: int
    continue_tokens: int
    perplexity: float
    standard_error: float
    agreement: float
    kl: float
    acceptance: float
    acceptance_error: float
    resident_bytes: int
    kept: tuple[int, ...]

    @property
    def label(self) -> str:
        return self.variant.label()

    def to_json(self) -> dict[str, Any]:
        lengths = {"prompt_tokens": self.prompt_tokens, "continue_tokens": self.continue_tokens}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return {**lengths, "label": self.label, **self.variant.facts(*VARIANT), **numbers}


def encode_text(engine: Engine, text: str, *, bos: bool = False, most: int = 2**20) -> tuple[list[int], list[int]]:
    """Token ids of a text, or of a long one at least the first `most`, without special ones; and the tokens to put
    before every prompt: none, or with `bos` the model's BOS token. Raises OptionError where the model has none."""
    if bos and engine.tokenizer.bos_token_id is None:
        raise OptionError(f"{engine.name} has no BOS token: leave out --bos")
    ids = first_tokens(lambda part: list(engine.tokenizer(part, add_special_tokens=False)["input_ids"]), text, most)
    return engine.opened.check_tokens(ids), [engine.tokenizer.bos_token_id] if bos else []


def windows(ids: Sequence[int], prompt: int, following: int, count: int) -> list[Pair]:
    """`count` windows of prompt + following tokens, back to back. Raises PromptError for too short a text."""
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
    """Perplexity for every prompt length, every continuation length and every variant, in this order.

    All are measured at the same places: a shorter prompt is the end of a window's prompt, a shorter continuation the
    beginning of its continuation. `before`: tokens to put before every prompt; they do not count."""
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
    """Means over windows, of the first `following` tokens of each."""
    losses = [-one.log_probability[:following].mean().item() for one in scored]
    loss, error = mean_and_error(losses)
    agreement, _ = mean_and_error([one.agrees[:following].float().mean().item() for one in scored])
    kl, _ = mean_and_error([one.kl[:following].mean().item() for one in scored])
    acceptance, of_it = mean_and_error([one.acceptance[:following].mean().item() for one in scored])
    plan = variant.plan(engine, prompt + before, following)
    return Perplexity(
        variant=variant,
        prompt_tokens=prompt,
        continue_tokens=following,
        perplexity=math.exp(loss),
        standard_error=error,
        agreement=agreement,
        kl=kl,
        acceptance=acceptance,
        acceptance_error=of_it,
        resident_bytes=plan.resident_bytes,
        kept=tuple(layer.kept for layer in plan.layers),
    )
