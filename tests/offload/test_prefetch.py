"""The reading thread: never more than a ring ahead, and ended by whatever happens."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors_files import layout
from torch import Tensor

from griffin_offload.checkpoint.headers import SINGLE, TensorInfo, read_header
from griffin_offload.checkpoint.reader import Reader
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


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "griffin-reader"]


def layers(folder: Path, count: int = 6) -> list[Load]:
    """`count` layers of one tensor each, that share two buffers."""
    buffers = [torch.zeros(1000), torch.zeros(1000)]
    tensors = {f"{i}": torch.full((1000,), float(i)) for i in range(count)}
    return [Load({info: buffers[i % 2]}) for i, info in enumerate(read_header(layout(folder / SINGLE, tensors)))]


def test_the_thread_is_never_more_than_the_ring_ahead(tmp_path: Path) -> None:
    reader, reads = Recorder(), layers(tmp_path)
    with Prefetch(reader, reads, 2) as prefetch:
        for index in range(6):
            prefetch.wait(index)
            ahead = min(index + 2, 6)
            assert until(lambda ahead=ahead: len(reader.seen) >= ahead)
            time.sleep(0.02)
            assert reader.seen == [f"{i}" for i in range(ahead)]
            (buffer,) = reads[index].read.values()
            assert buffer.eq(index).all(), "what is in the buffer stays until it is given back"
            prefetch.release()
    assert reading_threads() == []


def test_what_the_reader_raises_comes_out_of_wait(tmp_path: Path) -> None:
    reads = layers(tmp_path)
    (info,) = reads[3].read
    os.truncate(tmp_path / SINGLE, info.begin + 8)
    with Prefetch(Recorder(), reads, 2) as prefetch:
        for index in range(3):
            prefetch.wait(index)
            prefetch.release()
        with pytest.raises(CheckpointError, match="cut short"):
            prefetch.wait(3)
    assert reading_threads() == []


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_closing_in_the_middle_ends_the_thread(tmp_path: Path, after: int) -> None:
    reader = Recorder()
    with Prefetch(reader, layers(tmp_path), 2) as prefetch:
        for index in range(after):
            prefetch.wait(index)
            prefetch.release()
    assert reading_threads() == []
    assert len(reader.seen) <= after + 2
    prefetch.close()  # harmless


def test_an_exception_inside_ends_the_thread_and_a_thread_never_started_is_no_matter(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Prefetch(Recorder(), layers(tmp_path), 2):
        raise KeyboardInterrupt
    assert reading_threads() == []
    Prefetch(Recorder(), layers(tmp_path), 2).close()
