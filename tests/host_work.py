"""What the host asks of an emulated device for each token, beside the replay of its step."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from emulator import graphs, streams, tensor

PASSED_OVER = ("emulator", "host_work", "/torch/")  # in the paths of code that nothing is ascribed to


@dataclass
class TokenWork:
    """From one replay to the next: operators and copies that are launched while the device may still be at work
    (`meanwhile`), and after the first wait, when the device has nothing to do (`between`); what the host `waits` for.
    Each as 'operator in function'."""

    meanwhile: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


@contextmanager
def tokens_watched() -> Iterator[list[TokenWork]]:
    """The work of each token that follows a replay, until the block ends."""
    tokens: list[TokenWork] = []
    submit, no_waiting, replay = streams.Stream.submit, tensor.no_waiting, graphs.CUDAGraph.replay

    def submitted(stream: Any, name: str, *args: Any) -> None:
        submit(stream, name, *args)
        if tokens and name != "a graph" and not name.startswith("aten::empty"):
            now = tokens[-1].between if tokens[-1].waits else tokens[-1].meanwhile
            now.append(f"{name.removeprefix('aten::')} in {_caller()}")

    def waited(what: str) -> None:
        no_waiting(what)
        if tokens and what != "tolist":  # that copies, which waits
            tokens[-1].waits.append(f"{what.removeprefix('aten::')} in {_caller()}")

    def replayed(graph: Any) -> None:
        replay(graph)
        tokens.append(TokenWork())

    with (
        patch.object(streams.Stream, "submit", submitted),
        patch.object(tensor, "no_waiting", waited),
        patch.object(graphs.CUDAGraph, "replay", replayed),
    ):
        yield tokens


def _caller() -> str:
    frame = sys._getframe(2)
    while any(each in frame.f_code.co_filename for each in PASSED_OVER):
        assert frame.f_back
        frame = frame.f_back
    return frame.f_code.co_qualname
