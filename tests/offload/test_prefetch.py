"""The reading threads: never more than a ring ahead, and ended by whatever happens."""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import reading_threads
from safetensors_files import layout
from torch import Tensor

from griffin_offload.checkpoint.headers import TensorInfo, read_header
from griffin_offload.checkpoint.reader import Reader
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.errors import CheckpointError
from griffin_offload.offload.prefetch import Load, Prefetch


class Recorder(Reader):
    """A reader that remembers which tensors were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def read(self, wanted: Mapping[TensorInfo, Tensor]) -> None:
        super().read(wanted)
        self.seen += [info.name for info in wanted]

    @property
    def layers(self) -> list[str]:
        """The layers of the tensors, in order."""
        return sorted(name.partition(".")[0] for name in self.seen)


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


PARTS = 3


def layers(reader: Reader, folder: Path, count: int = 6) -> tuple[list[Load], list[Tensor]]:
    """`count` layers of PARTS tensors each, a job for each, and the two buffers that the layers share."""
    buffers = [torch.zeros(PARTS, 1000), torch.zeros(PARTS, 1000)]
    tensors = {f"{i}.{p}": torch.full((1000,), float(i)) for i in range(count) for p in range(PARTS)}
    infos = iter(read_header(layout(folder / SINGLE, tensors)))
    loads = [Load([partial(reader.read, {next(infos): part}) for part in buffers[i % 2]]) for i in range(count)]
    return loads, buffers


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_are_never_more_than_the_ring_ahead(tmp_path: Path, threads: int) -> None:
    reader = Recorder()
    loads, buffers = layers(reader, tmp_path)
    with Prefetch(loads, 2, threads) as prefetch:
        for index in range(6):
            prefetch.wait(index)
            ahead = PARTS * min(index + 2, 6)
            assert until(lambda ahead=ahead: len(reader.seen) >= ahead)
            time.sleep(0.02)
            assert reader.layers == [f"{i}" for i in range(ahead // PARTS) for _ in range(PARTS)]
            assert buffers[index % 2].eq(index).all(), "what is in the buffer stays until it is given back"
            prefetch.release()
    assert reading_threads() == []


@pytest.mark.parametrize("threads", [1, 4])
def test_what_any_thread_raises_comes_out_of_wait(tmp_path: Path, threads: int) -> None:
    reader = Recorder()
    loads, _ = layers(reader, tmp_path)
    (info,) = loads[3].jobs[1].args[0]  # type: ignore[attr-defined]
    os.truncate(tmp_path / SINGLE, info.begin + 8)
    with Prefetch(loads, 2, threads) as prefetch:
        for index in range(3):
            prefetch.wait(index)
            prefetch.release()
        with pytest.raises(CheckpointError, match="cut short"):
            prefetch.wait(3)
    assert reading_threads() == []


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_closing_in_the_middle_ends_all_threads(tmp_path: Path, after: int, threads: int) -> None:
    reader = Recorder()
    with Prefetch(layers(reader, tmp_path)[0], 2, threads) as prefetch:
        for index in range(after):
            prefetch.wait(index)
            prefetch.release()
    assert reading_threads() == []
    assert len(reader.seen) <= PARTS * (after + 2)
    prefetch.close()  # harmless


def test_an_exception_inside_ends_the_threads_and_threads_never_started_are_no_matter(tmp_path: Path) -> None:
    loads, _ = layers(Recorder(), tmp_path)
    with pytest.raises(KeyboardInterrupt), Prefetch(loads, 2, 4):
        raise KeyboardInterrupt
    assert reading_threads() == []
    Prefetch(loads, 2, 4).close()


def test_a_layer_is_complete_once_and_after_all_of_its_jobs() -> None:
    """Jobs that end in any order, and layers of none."""
    done: list[str] = []

    def job(layer: int, seconds: float) -> None:
        time.sleep(seconds)
        done.append(f"{layer}")

    loads = [
        Load([partial(job, i, s) for s in (0.01, 0.0, 0.004)[: i % 4]], partial(done.append, f"{i}!")) for i in range(9)
    ]
    with Prefetch(loads, 9, 4) as prefetch:
        for index in range(9):
            prefetch.wait(index)
            assert done.count(f"{index}!") == 1
            assert done.count(f"{index}") == index % 4
            assert f"{index}" not in done[done.index(f"{index}!") :]
