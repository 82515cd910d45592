"""Which of the catalogue's models fit a budget: from their configs alone, nothing is fetched."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig

from ..model.kv_cache import windows
from ..model.skeleton import Skeleton
from .ladder import best_that_fits, climb, describe
from .request import Request
from .sizes import ModelSizes, model_sizes

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
    return replace(_row(_text(config), request), alias=alias)


def catalogue_sizes(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> ModelSizes:
    """Sizes of a model with these fields of a config, in a checkpoint of that dtype."""
    return _sizes(_text(config), dtype)


@lru_cache(maxsize=256)
def _row(fields: str, request: Request) -> CatalogueRow:
    """Without a name: several models have one shape."""
    sizes = _sizes(fields, torch.bfloat16)
    request = replace(request, prompt_tokens=PROMPT_TOKENS, max_new_tokens=ANSWER_TOKENS)
    best = best_that_fits((rung.divergence, plan) for rung, plan in climb(sizes, request))
    return CatalogueRow(
        "",
        sizes.full,
        sizes.resident(sizes.kept(0.5)),
        sizes.resident(sizes.kept(0.75)),
        describe(best) if best else None,
        best.resident_bytes if best else None,
    )


@lru_cache(maxsize=256)
def _sizes(fields: str, dtype: torch.dtype) -> ModelSizes:
    """From a skeleton: of one layer where the others are like it."""
    given = json.loads(fields)
    config = AutoConfig.for_model(**given)
    if "layer_types" in given or not layers_are_alike(config):
        return model_sizes(Skeleton(config, dtype).published_layout)
    one = AutoConfig.for_model(**{**given, "num_hidden_layers": 1})
    sizes, layers = model_sizes(Skeleton(one, dtype).published_layout), config.num_hidden_layers
    return replace(
        sizes, layers=sizes.layers * layers, cache_per_token=sizes.cache_per_token * layers, windows=windows(config)
    )


def layers_are_alike(config: Any) -> bool:
    """Whether all layers have the same tensors. Sliding and full attention have, unless the config says otherwise."""
    kinds = {kind.replace("sliding", "full") for kind in getattr(config, "layer_types", None) or []}
    differ = ("is_heterogeneous", "first_k_dense_replace", "num_kv_shared_layers")
    return len(kinds) <= 1 and not any(getattr(config, field, None) for field in differ)


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
