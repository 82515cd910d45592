"""Perplexity of a continuation after a prompt (arXiv:2404.01365, figure 5): the prompt by the full model, the
continuation by the experts that the prompt chose, both teacher-forced."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import PromptError


@dataclass(frozen=True)
class Score:
    """Means over all continuation tokens of all windows.

    `perplexity`: exp of the mean negative log-likelihood; `standard_error` of that mean over windows (nats);
    `agreement`: share of positions with the full model's most likely token; `kl`: of the full model's distribution
    from this one's (nats)."""

    sparsity: float
    perplexity: float
    standard_error: float
    agreement: float
    kl: float


def windows(ids: Sequence[int], prompt: int, following: int, count: int) -> list[list[int]]:
    """`count` runs of prompt + following tokens, one behind the other. Raises PromptError for too short a text."""
    size = prompt + following
    if len(ids) < size * count:
        raise PromptError(f"the text has {len(ids)} tokens; {count} windows of {size} need {size * count}")
    return [list(ids[i * size : (i + 1) * size]) for i in range(count)]


def perplexity(
    engine: Engine, texts: Sequence[Sequence[int]], prompt: int, sparsities: Sequence[float]
) -> Iterator[Score]:
    """One Score a sparsity; `texts` are token ids, of which the first `prompt` are the prompt."""
    full = [_log_probabilities(engine, ids, prompt, 0.0) for ids in texts]
    for sparsity in sparsities:
        losses, same, divergence = [], [], []
        for ids, truth in zip(texts, full, strict=True):
            ours = truth if sparsity == 0 else _log_probabilities(engine, ids, prompt, sparsity)
            following = torch.tensor(ids[prompt:])
            losses.append(-ours.gather(1, following[:, None]).mean().item())
            same.append((ours.argmax(1) == truth.argmax(1)).float().mean().item())
            divergence.append((truth.exp() * (truth - ours)).sum(1).mean().item())
        mean = sum(losses) / len(losses)
        spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / max(1, len(losses) - 1) / len(losses))
        yield Score(sparsity, math.exp(mean), spread, sum(same) / len(same), sum(divergence) / len(divergence))


@torch.no_grad()
def _log_probabilities(engine: Engine, ids: Sequence[int], prompt: int, sparsity: float) -> Tensor:
    """Of every token after the prompt: (G, V), float32. The first row is the full model's."""
    output = engine.sweep(list(ids[:prompt]), sparsity, len(ids) - prompt)
    rest = torch.tensor([list(ids[prompt:-1])], device=engine.device)
    after = engine.skeleton.model(rest, past_key_values=output.past_key_values, use_cache=True).logits[0]
    return torch.cat([output.logits[0, -1:], after]).float().cpu().log_softmax(-1)
