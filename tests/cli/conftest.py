"""The command in process, and models for it."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_line import Run
from griffin_offload.cli.main import griffin
from tiny import tiny_checkpoint


@pytest.fixture
def run() -> Run:
    """run(*arguments, stdin=None) -> click's Result, with stdout and stderr apart."""

    def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(griffin, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback is never the answer
        return result

    return invoke


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "llama", "llama", chat=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli-base") / "llama", "llama")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights, but many layers and a long context: time enough for Ctrl-C, in the sweep and in the answer."""
    folder = tmp_path_factory.mktemp("cli-slow") / "llama"
    return tiny_checkpoint(folder, "llama", chat=True, num_hidden_layers=48, max_position_embeddings=20_000)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough layers to skip some."""
    return tiny_checkpoint(tmp_path_factory.mktemp("cli-deep") / "llama", "llama", chat=True, num_hidden_layers=8)
