"""Which of the catalogue's models fit a budget: from their configs alone, nothing is fetched."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig

from ..model.kv_cache import windows
from ..model.skeleton import Skeleton
from ..planning.sizes import model_sizes
from .ladder import best_that_fits, climb, describe
from .request import Request
from .sizes import ModelSizes

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


def plan_catalogue(alias: str, config: Mapping[str, Any], request: Request) -> CatalogueRow:
    """The row of a model with this config; `request` says the budget and what the process holds already."""
    sizes = catalogue_sizes(config)
    request = replace(request, prompt_tokens=PROMPT_TOKENS, max_new_tokens=ANSWER_TOKENS)
    best = best_that_fits((rung.divergence, plan) for rung, plan in climb(sizes, request))
    return CatalogueRow(
        alias,
        sizes.full,
        sizes.resident(sizes.kept(0.5)),
        sizes.resident(sizes.kept(0.75)),
        describe(best) if best else None,
        best.resident_bytes if best else None,
    )


def catalogue_sizes(fields: Mapping[str, Any]) -> ModelSizes:
    """Sizes from a skeleton of one layer: the others are like it."""
    config = AutoConfig.for_model(**fields)
    layers = config.num_hidden_layers
    skeleton = Skeleton(AutoConfig.for_model(**{**fields, "num_hidden_layers": 1}), torch.bfloat16)
    one = model_sizes(skeleton.layout)
    return replace(
        one, layers=one.layers * layers, cache_per_token=one.cache_per_token * layers, windows=windows(config)
    )
