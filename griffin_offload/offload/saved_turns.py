"""The earlier turns of a conversation -> tensors by name, and facts (JSON types); and back.

What the next turn needs of them: the KV cache, the tokens that it is of, the statistics of the neurons, and how many of
these were kept in which formats. The kept neurons themselves are chosen anew by every turn's pass, from the statistics
and its own tokens."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..model.kv_cache import InRoom
from ..quant.precision import Precision
from .earlier_turns import Statistics
from .resident_model import ResidentModel

Tensors = dict[str, Tensor]


def pack(resident: ResidentModel) -> tuple[Tensors, dict[str, Any]] | None:
    """None where nothing is kept that a next turn could take over."""
    cache, ids, points = resident.turns.saved()
    layers = _layers(cache) if cache is not None else {}
    saved = {index: layer.saved() for index, layer in layers.items()}
    if not ids or not saved or None in saved.values():
        return None
    tensors: Tensors = {"token_ids": torch.tensor(ids)}
    lengths = {}
    for index, each in saved.items():
        assert each
        tensors[f"cache.{index}.keys"], tensors[f"cache.{index}.values"], lengths[index] = each
    for point, statistics in points.items():
        for layer, blocks in enumerate(statistics):
            for block, total in enumerate(blocks):
                if total is not None:
                    tensors[f"statistics.{point}.{layer}.{block}"] = total
    in_memory = resident.plan_of_layers
    return tensors, {
        "room": cache.tokens,
        "lengths": lengths,
        "points": {point: [len(blocks) for blocks in statistics] for point, statistics in points.items()},
        "kept": in_memory and in_memory[0],
        "precision": in_memory and asdict(in_memory[1]),
    }


def unpack(
    resident: ResidentModel,
    make_cache: Callable[[int], Any],
    read: Callable[[str], Tensor],
    names: set[str],
    facts: Mapping[str, Any],
) -> None:
    """Makes the turns of `resident` those that were packed. `make_cache`: a cache for so many tokens; `read`: a tensor
    by its name, which is one of `names`.

    Raises KeyError, ValueError or TypeError for what `pack` did not make; nothing is changed then."""
    cache = make_cache(int(facts["room"]))
    layers = _layers(cache, used=False)
    for index, tokens in facts["lengths"].items():
        layer = layers[int(index)]
        keys, values = (read(f"cache.{index}.{which}").to(resident.device) for which in ("keys", "values"))
        layer.restore(keys, values, int(tokens))
    points: dict[int, Statistics] = {}
    for point, blocks in facts["points"].items():
        named = [
            [f"statistics.{point}.{layer}.{block}" for block in range(count)] for layer, count in enumerate(blocks)
        ]
        points[int(point)] = [tuple(read(name) if name in names else None for name in layer) for layer in named]
    kept = facts["kept"] and tuple(tuple(int(k) for k in layer) for layer in facts["kept"])
    in_memory = (kept, Precision(**facts["precision"])) if kept else None
    resident.turns.restore(cache, [int(token) for token in read("token_ids").tolist()], points)
    resident.turns.resident = in_memory


def _layers(cache: Any, used: bool = True) -> dict[int, InRoom]:
    """The layers of a cache that hold keys, by number; of a new one those that may."""
    found = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, InRoom)}
    return {index: layer for index, layer in found.items() if not used or layer.is_initialized}  # type: ignore[attr-defined]
