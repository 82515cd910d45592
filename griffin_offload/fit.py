"""Which of the catalogue's models fit a budget: from their configs alone, nothing is fetched."""

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig

from .cache import windows
from .plan import ModelSizes, Request, smallest_sparsity
from .skeleton import Skeleton
from .sources.catalogue import CatalogueModel

PROMPT_TOKENS, ANSWER_TOKENS = 512, 256


@dataclass(frozen=True)
class CatalogueRow:
    """One model against a budget. Bytes in bfloat16; `density`: the largest share of neurons that fits, or None."""

    alias: str
    full_bytes: int
    resident_50: int
    resident_75: int
    verdict: str
    density: float | None


def plan_catalogue(model: CatalogueModel, request: Request) -> CatalogueRow:
    """The row of one model; `request` says the budget and what the process holds already."""
    sizes = catalogue_sizes(model)
    request = replace(request, prompt_tokens=PROMPT_TOKENS, max_new_tokens=ANSWER_TOKENS)
    sparsity = smallest_sparsity(sizes, request)
    return CatalogueRow(
        model.alias,
        sizes.full,
        sizes.resident(sizes.kept(0.5)),
        sizes.resident(sizes.kept(0.75)),
        _verdict(sparsity),
        None if sparsity is None else round(1 - sparsity, 2),
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


def _verdict(sparsity: float | None) -> str:
    if sparsity is None:
        return "does not fit"
    return "fits whole" if sparsity == 0 else f"fits at sparsity {max(sparsity, 0.5):g}"
