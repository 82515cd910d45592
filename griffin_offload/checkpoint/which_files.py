"""Which files of a folder are the checkpoint, as transformers decides: the file that config.json names, else the single
file, else the shards that the index names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..foreign import shown
from ..inputs import VOCABULARY, read_input
from ..small_json import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class WeightFiles:
    """`names` of the files, in the order in which transformers reads them; `index`: the file that names them, or ''.

    `said`: which of them should hold a tensor, as the index says; it need not be true."""

    names: tuple[str, ...]
    index: str = ""
    said: dict[str, str] = field(default_factory=dict)


def weight_files_of(folder: Path, facts: Mapping[str, Any] | None = None) -> WeightFiles:
    """`facts`: of config.json, where it has been read. Raises CheckpointError where there are no files, or the index is
    damaged."""
    name = _named_by_config(folder, _facts_of(folder) if facts is None else facts)
    if name is None:
        single = (folder / SINGLE).is_file() or not (folder / INDEX).exists()
        name = SINGLE if single else INDEX
        if single and not (folder / SINGLE).exists() and not (folder / SINGLE).is_symlink():
            raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; {_what_else(folder)}")
    if not name.endswith(".index.json"):
        return WeightFiles((name,))
    path = folder / name
    try:
        weight_map = json.loads(read_input(path, VOCABULARY))["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it has no weight_map from tensor names to file names") from None
    return WeightFiles(tuple(sorted(set(weight_map.values()))), name, dict(weight_map))


def _facts_of(folder: Path) -> Mapping[str, Any]:
    """What config.json says; nothing where it is missing or damaged."""
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError):
        return {}


def _named_by_config(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """The file that config.json names; None where it names none. Raises CheckpointError for what is no safetensors."""
    name = facts.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        told = shown(repr(name), 120)
        raise CheckpointError(f"{folder}/config.json: transformers_weights is {told}; Griffin reads safetensors only")
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or len(parts) != 1:
        raise CheckpointError(
            f"{folder}/config.json: transformers_weights names {shown(repr(name), 120)}, which is elsewhere"
        )
    return name


def _what_else(folder: Path) -> str:
    if (folder / ADAPTER).exists():
        return "it is an adapter (LoRA): merge it into its base model and give the merged folder"
    return "Griffin reads safetensors only"
