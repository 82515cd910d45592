"""Folders and files: where models, chats and settings are kept, what a model's folder is called, and room for one."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import BudgetError, GriffinError
from .files import free_disk
from .units import format_bytes
from .workspace import sweep

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def expand(name: str | Path) -> Path:
    """A path with the home folder in the place of ~, or ~somebody. Raises GriffinError where nobody knows it."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise GriffinError(f"{name}: there is no home folder for its ~; write the folder itself") from None


def cache_folder() -> Path:
    """$GRIFFIN_CACHE, else $XDG_CACHE_HOME/griffin, else ~/.cache/griffin."""
    if own := os.environ.get("GRIFFIN_CACHE"):
        return expand(own)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "griffin"


def config_file() -> Path:
    """The user's settings: $GRIFFIN_CONFIG, else griffin.toml in $XDG_CONFIG_HOME/griffin or ~/.config/griffin."""
    if own := os.environ.get("GRIFFIN_CONFIG"):
        return expand(own)
    return expand(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "griffin" / "griffin.toml"


def state_folder() -> Path:
    """For what cannot be made again: $GRIFFIN_STATE, else $XDG_STATE_HOME/griffin, else ~/.local/state/griffin."""
    if own := os.environ.get("GRIFFIN_STATE"):
        return expand(own)
    return expand(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "griffin"


def sweep_ours() -> None:
    """Removes what killed processes left in the cache, the state folder and the folder for temporary files."""
    with suppress(OSError):
        sweep(Path(tempfile.gettempdir()))
    for folder in (cache_folder(), state_folder()):
        sweep(folder)
        with suppress(OSError):
            for name in os.listdir(folder):
                sweep(folder / name)


def has_config(folder: Path) -> bool:
    """Whether a folder has a config and a tokenizer."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in TOKENIZERS)


def source_name(model: str, path: Path) -> str:
    """A model's name without the folder that it is in."""
    given = Path(model)
    return given.name if given.is_file() else path.name if given.exists() else model


def require_disk(folder: Path, need: int, name: str) -> None:
    """Raises BudgetError if `folder` is on a disk with less than `need` bytes free, which `name` takes."""
    if (free := free_disk(folder)) < need:
        raise BudgetError(
            f"{name} needs {format_bytes(need)} of disk and {folder} has {format_bytes(free)} free; "
            "make room, or point HF_HOME and GRIFFIN_CACHE at a larger disk"
        )
