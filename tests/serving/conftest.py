"""Tiny models behind a server on the loopback, in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint

from griffin_offload import Engine

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from servers import TOOLS_TEMPLATE, Server

from griffin_offload.options import Decoding
from griffin_offload.serving.served import Limits, Served


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose chat template takes tools."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("serving") / "tiny-llama", "llama", chat=True, max_position_embeddings=4096
    )
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def engine(folder: Path) -> Engine:
    return Engine(folder)


@pytest.fixture(scope="session")
def served(engine: Engine) -> Served:
    return Served(engine, decoding=Decoding(greedy=True, max_new_tokens=12), aliases=("gpt-tiny",))


@pytest.fixture(scope="session")
def server(served: Served) -> Iterator[Server]:
    running = Server(served)
    yield running
    running.stop()


@pytest.fixture
def starts(folder: Path) -> Iterator[Callable[..., Server]]:
    """starts(**limits) -> a server of its own."""
    running: list[Server] = []

    def start(api_key: str | None = None, **limits: Any) -> Server:
        served = Served(Engine(folder), decoding=Decoding(greedy=True, max_new_tokens=12), limits=Limits(**limits))
        running.append(Server(served, api_key))
        return running[-1]

    yield start
    for each in running:
        each.stop()
