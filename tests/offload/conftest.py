"""Tiny checkpoints of six layers, for blocks that are skipped."""

from pathlib import Path

import pytest
from skipping import DEEP, SIX
from tiny import tiny_checkpoint


@pytest.fixture(scope="module", params=DEEP)
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of six layers, of each architecture in turn."""
    return tiny_checkpoint(tmp_path_factory.mktemp("deep") / request.param, request.param, **DEEP[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("deep") / "llama", "llama", **SIX)
