"""Scores of all neurons over many texts, in a small file: for a static model, or beside a prompt's own statistic.

A score is one of statistic.STATISTICS: by default GRIFFIN's Σ z̄² over all tokens of all texts (arXiv:2404.01365). All
are sums, so that shares of them can be mixed. F neurons, E routed experts."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GriffinError, OptionError
from ..files import reason, write_whole
from ..foreign import NAME, sentence
from ..inputs import require_plain
from ..small_json import need, parse_object
from ..units import MIB

FORMAT = "griffin-prior"
LARGEST = 1024 * MIB
Scores = tuple[tuple[Tensor, ...], ...]  # by layer and block
TOKENS = 64.0  # of a prompt: a prior counts as much as so many, where nobody gives it a weight (docs/results.md)


@dataclass(frozen=True, eq=False)
class Prior:
    """`scores[layer][block]`: (F,) or (E, F), float32. `facts`: how they were made, for cards and reports: "model",
    "key" (checkpoint_key of its checkpoint), "score", "seed", "texts" ..."""

    scores: Scores
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> list[list[list[int]]]:
        return [[list(score.shape) for score in layer] for layer in self.scores]

    def __repr__(self) -> str:
        """Two that differ in any number have different ones."""
        digest = hashlib.sha256(json.dumps(dict(self.facts), default=repr, sort_keys=True).encode())
        for layer in self.scores:
            for score in layer:
                digest.update(score.float().cpu().contiguous().numpy().tobytes())
        return f"Prior({digest.hexdigest()[:16]})"

    def join(self, statistic: Tensor, layer: int, block: int, weight: float | None) -> Tensor:
        """A prompt's statistic (F,) or (E, F) and the prior's scores, each scaled to sum 1, mixed: float32.

        Weight 0 gives the statistic itself, 1 the prior's scores. None: the prior counts like TOKENS tokens more of the
        prompt, whose statistic has sum 1 for each; of an expert, for each that was routed to it."""
        ours = self.scores[layer][block].to(statistic.device)
        if weight is None:
            return statistic + TOKENS * _share(ours)
        if weight in (0.0, 1.0):
            return ours if weight else statistic
        return (1 - weight) * _share(statistic) + weight * _share(ours)


def weight_at(tokens: float) -> float:
    """The weight of a prior that counts like TOKENS tokens, beside a prompt of so many."""
    return TOKENS / (TOKENS + tokens)


def _share(score: Tensor) -> Tensor:
    return score / score.sum(-1, keepdim=True).clamp_min(1e-30)


def check_prior(prior: Prior, shapes: Sequence[Sequence[Sequence[int]]], name: str) -> None:
    """Raises OptionError unless the prior has the model's `shapes`, by layer and block. `name`: the model's."""
    if prior.shapes != [[list(shape) for shape in layer] for layer in shapes]:
        made_of = prior.facts.get("model", "another model")
        raise OptionError(f"the prior is of {made_of}, whose layers are not those of {name}")


def prior_path(cache_folder: Path, key: str) -> Path:
    """The file of the prior that a checkpoint has without asking, by the checkpoint's key."""
    return cache_folder / "prior" / f"{key[:16]}.safetensors"


def save_prior(path: Path, prior: Prior, *, new: bool = False) -> None:
    """Writes a prior as safetensors, whole or not at all; `new`: over no file. Raises GriffinError."""
    tensors = {
        f"{number}.{place}": score.float().cpu().contiguous()
        for number, layer in enumerate(prior.scores)
        for place, score in enumerate(layer)
    }
    facts = {"layers": len(prior.scores), **prior.facts}
    try:
        with write_whole(path, new=new) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise GriffinError(f"the prior cannot be written to {path}: {reason(error)}") from None


def load_prior(path: Path) -> Prior:
    """Reads what `save_prior` wrote. Raises GriffinError."""
    try:
        require_plain(path, LARGEST)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("its header does not say so")
            facts = _checked_facts(parse_object(metadata["facts"]))
            names = set(file.keys())
            if not 1 <= facts["layers"] <= len(names):
                raise ValueError(f"it says {facts['layers']} layers, and holds {len(names)} tensors")
            scores = tuple(tuple(_blocks(file, names, layer)) for layer in range(facts["layers"]))
    except FileNotFoundError:
        raise GriffinError(f"{path} does not exist: `griffin export-pruned --calibration` writes a prior") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise GriffinError(f"{path} is not a prior of griffin export-pruned: {sentence(reason(error), NAME)}") from None
    if any(not bool(score.isfinite().all()) or bool((score < 0).any()) for layer in scores for score in layer):
        raise GriffinError(f"{path} is not a prior: it holds scores that are negative or no numbers")
    return Prior(scores, facts)


def _checked_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError where one that is used is of another kind."""
    need(facts, "layers", int)
    for name in ("model", "key", "score", "text_sha256", "source"):
        need({name: "", **facts}, name, str)
    for name in ("samples", "seed"):
        need({name: 0, **facts}, name, int)
    need({"measured_s": 0, **facts}, "measured_s", float)
    return facts


def _blocks(file: Any, names: set[str], layer: int) -> Iterator[Tensor]:
    """The scores of a layer's blocks. Raises ValueError for tensors that hold none."""
    for block in takewhile(lambda block: f"{layer}.{block}" in names, count()):
        score = file.get_tensor(f"{layer}.{block}")
        if score.dtype != torch.float32:
            raise ValueError(f"{layer}.{block} is {str(score.dtype).removeprefix('torch.')}, not float32")
        yield score
