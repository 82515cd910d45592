"""What every test gets: no network, a cache of its own, quiet libraries, and the real models where there are any."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub's client, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests start processes

import pytest
import torch
import transformers
from cases import Case
from tiny import COMMON, TINY
from torch.backends import mkldnn

_REAL_CACHE = os.environ.get("GRIFFIN_CACHE")

torch.set_num_threads(1)  # two threads on two busy cores wait for each other: 6 times slower even on the real models
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def onednn_stays_on() -> Iterator[None]:
    """Whatever a test stops, breaks or runs side by side: the process's switch is back where it was."""
    yield
    assert mkldnn.enabled


@pytest.fixture(scope="session")
def test_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of all tests that are not marked real."""
    return tmp_path_factory.mktemp("griffin-cache")


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, test_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("GRIFFIN_CACHE", str(test_cache))


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(kind): the tiny model of a kind, with the oracle's answers, made when first asked for."""
    base = tmp_path_factory.mktemp("cases")
    return cache(lambda kind: Case(kind, base / kind))


@pytest.fixture(scope="session", params=COMMON)
def tiny(request: pytest.FixtureRequest, case: Callable[[str], Case]) -> Path:
    """A tiny checkpoint of each common architecture in turn; its folder is named by the model type."""
    return case(request.param).folder


@pytest.fixture(params=TINY)
def every(request: pytest.FixtureRequest, case: Callable[[str], Case]) -> Case:
    """The tiny model of every architecture in turn."""
    return case(request.param)


@pytest.fixture(scope="session")
def smol() -> Path:
    """SmolLM2-135M-Instruct's folder."""
    return _real_model("smollm2-135m", "GRIFFIN_TEST_SMOL")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M's folder."""
    return _real_model("gemma-3-270m", "GRIFFIN_TEST_GEMMA")


def _real_model(alias: str, variable: str) -> Path:
    if folder := os.environ.get(variable):
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{variable}={folder} has no config.json")
        return Path(folder)

    from griffin_offload.errors import ModelNotFound
    from griffin_offload.sources.resolve import resolve

    with pytest.MonkeyPatch.context() as patch:  # wherever this is called from, look in the user's own cache
        if _REAL_CACHE is None:
            patch.delenv("GRIFFIN_CACHE", raising=False)
        else:
            patch.setenv("GRIFFIN_CACHE", _REAL_CACHE)
        try:
            return resolve(alias, fetch=False)
        except ModelNotFound as error:
            pytest.skip(f"{alias} is not on this machine (griffin pull {alias}, or set {variable}): {error}")
