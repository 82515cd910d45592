"""What many texts say of the neurons, kept in a small file: experts of a static model, or a prior for a prompt's own.

A prior holds a score for every neuron, by layer and block: GRIFFIN's Σ z̄² over all tokens of all texts
(arXiv:2404.01365), or another of `choices.SCORES`. A score adds up like s² does, so that shares of it can be mixed.
F neurons, E routed experts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GriffinError, OptionError
from ..files import reason, write_whole
from ..units import MIB

FORMAT = "griffin-prior"
Scores = tuple[tuple[Tensor, ...], ...]  # by layer and block
WEIGHT = 0.4  # of a prior beside a prompt: measured on two models (docs/results.md)


@dataclass(frozen=True, eq=False)
class Prior:
    """`scores[layer][block]`: (F,) or (E, F), float32. `facts`: what they were made of, for cards and reports:
    "model", "key" (of the checkpoint: allocation.checkpoint_key), "score", "seed", "texts" ..."""

    scores: Scores
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> list[list[list[int]]]:
        return [[list(score.shape) for score in layer] for layer in self.scores]

    def join(self, statistic: Tensor, layer: int, block: int, weight: float) -> Tensor:
        """A prompt's statistic (F,) or (E, F) mixed with the prior's, each brought to the sum 1: float32.

        Weight 0 is the statistic itself, 1 the prior's scores themselves."""
        ours = self.scores[layer][block].to(statistic.device)
        if weight in (0.0, 1.0):
            return ours if weight else statistic
        return (1 - weight) * _share(statistic) + weight * _share(ours)


def _share(score: Tensor) -> Tensor:
    return score / score.sum(-1, keepdim=True).clamp_min(1e-30)


def check_prior(prior: Prior, shapes: Sequence[Sequence[Sequence[int]]], name: str) -> None:
    """Raises OptionError for a prior whose neurons are not those of a model called `name`."""
    if prior.shapes != [[list(shape) for shape in layer] for layer in shapes]:
        made_of = prior.facts.get("model", "another model")
        raise OptionError(f"the prior is of {made_of}, whose layers are not those of {name}")


def save_prior(path: Path, prior: Prior) -> None:
    """Write a prior as safetensors, whole or not at all. Raises GriffinError."""
    tensors = {
        f"{number}.{place}": score.float().cpu().contiguous()
        for number, layer in enumerate(prior.scores)
        for place, score in enumerate(layer)
    }
    facts = {"layers": len(prior.scores), **prior.facts}
    try:
        with write_whole(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise GriffinError(f"the prior cannot be written to {path}: {reason(error)}") from None


def load_prior(path: Path) -> Prior:
    """Read what `save_prior` wrote. Raises GriffinError."""
    try:
        if path.stat().st_size > 1024 * MIB:
            raise ValueError("it is larger than any prior")
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if told.get("format") != FORMAT:
                raise ValueError("its header does not say so")
            facts = json.loads(told["facts"])
            places = [tuple(int(part) for part in name.split(".")) for name in file.keys()]  # noqa: SIM118
            scores = tuple(
                tuple(file.get_tensor(f"{layer}.{block}") for block in range(sum(i == layer for i, _ in places)))
                for layer in range(int(facts["layers"]))
            )
    except FileNotFoundError:
        raise GriffinError(f"{path} does not exist: `griffin export-pruned --calibration` writes a prior") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GriffinError(f"{path} is not a prior of griffin export-pruned: {error}") from None
    if any(not bool(score.isfinite().all()) or bool((score < 0).any()) for layer in scores for score in layer):
        raise GriffinError(f"{path} is not a prior: it holds scores that are negative or no numbers")
    return Prior(scores, facts)
