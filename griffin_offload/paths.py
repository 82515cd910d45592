"""The cache folder, and names of models' folders."""

import os
from pathlib import Path

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def cache_folder() -> Path:
    """$GRIFFIN_CACHE, else $XDG_CACHE_HOME/griffin, else ~/.cache/griffin."""
    if own := os.environ.get("GRIFFIN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "griffin"


def has_config(folder: Path) -> bool:
    """Whether a folder has a config and a tokenizer."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in TOKENIZERS)


def source_name(model: str, path: Path) -> str:
    """A model's name without the folder that it is in."""
    given = Path(model)
    return given.name if given.is_file() else path.name if given.exists() else model
