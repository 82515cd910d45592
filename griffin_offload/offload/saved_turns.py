"""The earlier turns of a conversation -> tensors by name, and facts (JSON types); and back.

What the next turn needs of them: the KV cache, the tokens that it is of, the statistics of the neurons, and how many of
these were kept in which formats. The kept neurons themselves are chosen anew by every turn's pass, from the statistics
and its own tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..model.cache_layers import InRoom
from ..model.recurrent import KeepsStates
from ..quant.precision import Precision
from .earlier_turns import Statistics
from .resident_model import ResidentModel

Tensors = dict[str, Tensor]


def pack(resident: ResidentModel) -> tuple[Tensors, dict[str, Any]] | None:
    """None where nothing is kept that a next turn could take over."""
    cache, ids, points = resident.turns.saved()
    if cache is None or not ids:
        return None
    tensors: Tensors = {"token_ids": torch.tensor(ids)}
    lengths, states = {}, {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, InRoom) and layer.is_initialized:
            if (saved := layer.saved()) is None:
                return None
            tensors[f"cache.{index}.keys"], tensors[f"cache.{index}.values"], lengths[index] = saved
        if isinstance(layer, KeepsStates):
            named, states[index] = layer.saved_states()
            tensors |= {f"cache.{index}.{name}": state for name, state in named.items()}
    for point, statistics in points.items():
        for number, blocks in enumerate(statistics):
            for block, total in enumerate(blocks):
                if total is not None:
                    tensors[f"statistics.{point}.{number}.{block}"] = total
    in_memory = resident.plan_of_layers
    return tensors, {
        "room": cache.tokens,
        "lengths": lengths,
        "states": states,
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
    shape: Sequence[int],
) -> None:
    """Makes the turns of `resident` those that were packed. `make_cache`: a cache for so many tokens; `read`: a tensor
    by its name, which is one of `names`; `shape`: feed-forward blocks of each layer of the model.

    Raises KeyError, ValueError, TypeError, IndexError or RuntimeError for what `pack` did not make; nothing is changed
    then."""
    cache = make_cache(int(facts["room"]))
    for index, tokens in facts["lengths"].items():
        keys, values = (read(f"cache.{index}.{which}").to(resident.device) for which in ("keys", "values"))
        cache.layers[int(index)].restore(keys, values, int(tokens))
    for index, each in facts["states"].items():
        cache.layers[int(index)].restore_states(_of_layer(read, index, resident.device), each)
    points: dict[int, Statistics] = {}
    for point, blocks in facts["points"].items():
        if blocks != list(shape):
            raise ValueError("its statistics are those of other layers")
        named = [[f"statistics.{point}.{layer}.{i}" for i in range(count)] for layer, count in enumerate(blocks)]
        points[int(point)] = [tuple(read(name) if name in names else None for name in layer) for layer in named]
    kept = facts["kept"] and tuple(tuple(int(k) for k in layer) for layer in facts["kept"])
    in_memory = (kept, Precision(**facts["precision"])) if kept else None
    resident.turns.restore(cache, [int(token) for token in read("token_ids").tolist()], points)
    resident.turns.resident = in_memory


def _of_layer(read: Callable[[str], Tensor], index: str, device: str) -> Callable[[str], Tensor]:
    return lambda name: read(f"cache.{index}.{name}").to(device)
