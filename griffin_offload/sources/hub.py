"""The Hugging Face hub: its cache on this machine, and downloads into it.

Only safetensors, configs and tokenizer files are fetched: nothing that is run or unpickled."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checkpoint.which_files import weight_files_of
from ..errors import (
    BudgetError,
    CheckpointError,
    FetchError,
    GriffinError,
    ModelNotFound,
    UnsupportedArchitecture,
    one_line,
)
from ..files import FULL
from ..inputs import read_input
from ..model.architecture import architecture
from ..model.wrappers import refuse_wrapper
from ..paths import has_config, require_disk

ALLOW = ["*.safetensors", "*.json", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.*", "*.jinja"]
# Folders (original/, onnx/) and consolidated* hold the same weights again, in other formats.
IGNORE = ["*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors"]
REVISION = re.compile(r"\w[\w.-]{0,99}")  # a commit: the name of a folder of snapshots
HUB_BOT = "SFconvertbot"
TIMEOUT = 5.0  # seconds for the hub to accept a connection, and again to answer
PATIENCE = 10.0  # seconds for both and for name look-up, over all of the hub's addresses

Progress = Callable[[str, int, int], None]


class UnreachableError(FetchError):
    """The hub did not answer; another source may."""


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder of a complete snapshot in the hub's cache on this machine, or None."""
    from huggingface_hub import constants

    return snapshot_of(Path(constants.HF_HUB_CACHE) / ("models--" + hub_id.replace("/", "--")))


def snapshot_of(repository: Path) -> Path | None:
    """The folder of a complete snapshot in a repository's folder of the hub's cache (models--owner--name), or None."""
    for ref in (repository / "refs" / "main", *sorted(repository.glob("refs/refs/pr/*"))):
        with suppress(OSError, ValueError):  # no file, or one that names no revision
            revision = read_input(ref, 1000).decode().strip()
            if REVISION.fullmatch(revision) and is_complete(snapshot := repository / "snapshots" / revision):
                return snapshot
    return None


def cached_ids() -> list[str]:
    """Hub ids of which the hub's cache holds anything."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]


def is_complete(folder: Path) -> bool:
    """Whether a folder has a config, a tokenizer and every safetensors file that its index names."""
    try:
        return has_config(folder) and all((folder / name).is_file() for name in weight_files_of(folder).names)
    except (CheckpointError, OSError, ValueError):  # the last two: names that no file can have
        return False


def fetch(hub_id: str, *, licence: str = "", gated: bool = False, on_progress: Progress | None = None) -> Path:
    """Fetches a repository into the hub's own cache; returns its snapshot folder.

    Raises UnreachableError within seconds if the hub does not answer, FetchError for a gated model or one without
    safetensors, ModelNotFound, BudgetError."""
    from huggingface_hub import HfApi, constants, snapshot_download

    api = HfApi(library_name="griffin-offload")
    try:
        info, revision = _info(api, hub_id, None), "main"
        _refuse(hub_id, info.config or {})  # before many gigabytes come
        if not _has_weights(info):
            info, revision = _converted_by_the_hub(api, hub_id)
        cache = Path(constants.HF_HUB_CACHE)
        repository = cache / ("models--" + hub_id.replace("/", "--"))
        snapshot = repository / "snapshots" / str(info.sha)
        missing = sum(size for name, size in _wanted(info).items() if not (snapshot / name).exists())
        require_disk(cache, missing, hub_id)
        what = f"{hub_id} ({licence})" if licence else hub_id
        with _no_bars(), watched(repository / "blobs", what, missing, on_progress):
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=ALLOW, ignore_patterns=IGNORE))
    except GriffinError:
        raise
    except Exception as error:  # the client raises its HTTP library's errors, OSError and its own
        raise _explained(hub_id, gated, error) from error
    if not is_complete(folder):
        raise CheckpointError(
            f"{hub_id} is not whole on the hub: a shard, its config or its tokenizer is missing there"
        )
    return folder


def _refuse(hub_id: str, config: dict[str, Any]) -> None:
    """Raises UnsupportedArchitecture for a model that would be refused once it is there, by what the hub says of it."""
    if isinstance(model_type := config.get("model_type"), str):
        architecture(model_type)
        refuse_wrapper(model_type)
    if isinstance(facts := config.get("quantization_config"), dict) and facts.get("quant_method"):
        from ..checkpoint.quantized.find import method_of

        try:
            method_of(facts)
        except UnsupportedArchitecture as error:
            raise UnsupportedArchitecture(f"{hub_id}: {error}") from None


@contextmanager
def watched(folder: Path, what: str, total: int, on_progress: Progress | None) -> Iterator[None]:
    """Reports, from a thread, how much `folder` grows while the block runs: for the hub's client and for pip alike."""
    if on_progress is None:
        yield
        return
    start, done = _size(folder), threading.Event()

    def report() -> None:
        while not done.wait(0.2):
            on_progress(what, min(max(0, _size(folder) - start), total), total)

    thread = threading.Thread(target=report, daemon=True)
    on_progress(what, 0, total)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    on_progress(what, total, total)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            total += path.lstat().st_size
    return total


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turns the client's own progress bars off."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _info(api: Any, hub_id: str, revision: str | None) -> Any:
    """The client's model_info. Raises TimeoutError after PATIENCE: name look-up has no time limit of its own."""
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(api.model_info(hub_id, revision=revision, timeout=TIMEOUT, files_metadata=True))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not outcome:
        raise TimeoutError(f"no answer in {PATIENCE:.0f} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _wanted(info: Any) -> dict[str, int]:
    """The files to fetch: name -> bytes."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return {name: sizes[name] for name in filter_repo_objects(sizes, allow_patterns=ALLOW, ignore_patterns=IGNORE)}


def _has_weights(info: Any) -> bool:
    return any(name.endswith(".safetensors") for name in _wanted(info))


def _converted_by_the_hub(api: Any, hub_id: str) -> tuple[Any, str]:
    """(info, revision) of the safetensors that the hub's bot offers to old repositories in a pull request.

    transformers uses them too. Raises FetchError if there are none."""
    offers = api.get_repo_discussions(hub_id, author=HUB_BOT, discussion_type="pull_request", discussion_status="open")
    for offer in offers:
        if offer.author == HUB_BOT and _has_weights(info := _info(api, hub_id, offer.git_reference)):
            return info, offer.git_reference
    raise FetchError(
        f"{hub_id} holds no safetensors files, and Griffin loads neither pickled weights (.bin, .pt) nor this "
        "repository's code; convert it with transformers (from_pretrained, then save_pretrained) or download its "
        ".gguf file, and give that folder or file as the model"
    )


def _explained(hub_id: str, gated: bool, error: Exception) -> GriffinError:
    """The client's error as one of ours, in one line, with the way out."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    page = f"https://huggingface.co/{hub_id}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    # A refusal without the hub's own header comes from a proxy or a captive portal.
    from_hub = any(name in getattr(response, "headers", {}) for name in ("x-error-code", "x-error-message"))
    refused = status in (401, 403) and from_hub
    if isinstance(error, GatedRepoError) or (gated and refused):
        return FetchError(
            f"{hub_id} is gated: accept its licence at {page}, then run `hf auth login` or set HF_TOKEN, and try "
            "again; or give a folder that holds the model"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError) or (status == 404 and from_hub):
        return ModelNotFound(
            f"there is no model {hub_id} on the hub ({constants.ENDPOINT}), or it is private (`hf auth login`); "
            "`griffin models` lists the names known here"
        )
    if refused:
        return FetchError(f"the hub refuses {hub_id} ({status}): check the token (`hf auth whoami`, HF_TOKEN)")
    if isinstance(error, OSError) and error.errno in FULL:
        return BudgetError(f"the disk became full while {hub_id} was fetched; make room, and it goes on from there")
    if status is not None and status >= 500 and from_hub:
        return UnreachableError(f"the hub ({constants.ENDPOINT}) answers {hub_id} with an error ({status}): try later")
    return UnreachableError(
        f"the hub ({constants.ENDPOINT}) cannot be reached for {hub_id}: {one_line(error)}; give a folder "
        f"that holds the model, set HF_ENDPOINT to a mirror, or run `hf download {hub_id}` where there is a network "
        "and copy it here"
    )
