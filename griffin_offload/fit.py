"""Which of the catalogue's models fit a budget: from their configs alone, nothing is fetched."""

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig

from .cache import windows
from .ladder import climb
from .plan import Request
from .sizes import ModelSizes
from .skeleton import Skeleton
from .sources.catalogue import CatalogueModel

PROMPT_TOKENS, ANSWER_TOKENS = 512, 256


@dataclass(frozen=True)
class CatalogueRow:
    """One model against a budget. Bytes in bfloat16; `best`: what the ladder keeps of it, and in how many bytes; None
    if it does not fit."""

    alias: str
    full_bytes: int
    resident_50: int
    resident_75: int
    best: str | None
    best_bytes: int | None


def plan_catalogue(model: CatalogueModel, request: Request) -> CatalogueRow:
    """The row of one model; `request` says the budget and what the process holds already."""
    sizes = catalogue_sizes(model)
    request = replace(request, prompt_tokens=PROMPT_TOKENS, max_new_tokens=ANSWER_TOKENS)
    best = next(((rung, plan) for rung, plan in climb(sizes, request) if plan.fits), None)
    return CatalogueRow(
        model.alias,
        sizes.full,
        sizes.resident(sizes.kept(0.5)),
        sizes.resident(sizes.kept(0.75)),
        best and str(best[0]),
        best and best[1].resident_bytes,
    )


def catalogue_sizes(model: CatalogueModel) -> ModelSizes:
    """Sizes from a skeleton of one layer: the others are like it."""
    config = AutoConfig.for_model(**model.config)
    layers = config.num_hidden_layers
    one = Skeleton(AutoConfig.for_model(**{**model.config, "num_hidden_layers": 1}), torch.bfloat16).sizes()
    return replace(
        one,
        layers=one.layers * layers,
        cache_per_token=one.cache_per_token * layers,
        windows=windows(config),
    )
