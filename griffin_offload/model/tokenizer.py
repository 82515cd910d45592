"""Loads a checkpoint's tokenizer. An error becomes one line that names the file, and the package that reads it."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..checkpoint.inside import require_own_names
from ..errors import CheckpointError, UnsupportedArchitecture, one_line
from ..foreign import shown
from ..small_json import read_object
from .pretrained import load_config, read_config, require_small_files


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """transformers' tokenizer, without the checkpoint's own code. `config`: transformers' of the whole model; None:
    that of the folder, if it has one. Raises CheckpointError."""
    why = ""
    require_small_files(folder)
    try:
        if any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
            if config is None and (folder / "config.json").exists():  # else transformers reads it unchecked
                config = load_config(folder, read_config(folder))
            _check_tokenizer_config(folder, config)
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        why = _missing_package(folder) or "it holds no vocabulary, such as tokenizer.json"  # transformers makes one up
    except (CheckpointError, UnsupportedArchitecture):
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # many libraries, many exceptions; a panic of Rust's is no Exception
        why = _missing_package(folder) or one_line(error)
    raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {why}")


def _check_tokenizer_config(folder: Path, config: Any) -> None:
    """Raises CheckpointError where a file names a class of transformers that is no tokenizer, or files elsewhere."""
    path = folder / "tokenizer_config.json"
    facts = read_object(path) if path.exists() else {}
    if type(facts.get("model_max_length")) not in (int, float, type(None)):
        raise CheckpointError(f"{path}: model_max_length is no number")
    require_own_names(facts, "fast_tokenizer_files", path)
    for named in (facts.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
        fine = named is None or (isinstance(named, str) and TOKENIZER.fullmatch(named))
        if not fine or named == "AutoTokenizer":
            raise CheckpointError(f"{path}: tokenizer_class is {shown(repr(named), 60)}, which is no tokenizer's class")


TOKENIZER = re.compile(r"\w*(Tokenizer|TokenizerFast|Backend)")  # how transformers ends their classes' names
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "tekken.json")
# Files of tokenizers of older checkpoints -> packages that read them, and their modules.
_READERS = {
    "*.model": {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
    "*.tiktoken": {"tiktoken": "tiktoken"},
}


def _missing_package(folder: Path) -> str:
    """Which packages a folder's tokenizer needs that are not installed, and the way out; '' where none does."""
    if (folder / "tokenizer.json").is_file():
        return ""
    for pattern, packages in _READERS.items():
        file = next(iter(sorted(folder.glob(pattern))), None)
        missing = [package for package, module in packages.items() if not _installed(module)] if file else []
        if file and missing:
            return (
                f"{file.name} is read by {' and '.join(packages)}, and it has no tokenizer.json: "
                f"`pip install {' '.join(missing)}`, or add the tokenizer.json of its base model"
            )
    return ""


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
