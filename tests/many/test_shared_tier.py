"""Workers read a checkpoint from disk once for all of them, as far as their tier has room; the answers are the same."""

import os
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import leaves_the_cache
from tiny import tiny_checkpoint, tiny_prompt
from tiny_gguf import Q8, write_gguf

from griffin_offload import Engine
from griffin_offload.checkpoint.which_files import SINGLE
from griffin_offload.many.batches import Batch
from griffin_offload.many.places import cpu_places
from griffin_offload.many.workers import Work, Workers
from griffin_offload.options import Decoding, Placement, Pruning
from griffin_offload.units import MIB

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8}
PROMPTS = {(row,): {row: tiny_prompt(20 + row, row)} for row in range(8)}
PLACEMENT = Placement("cpu", threads=1, device_memory="8GiB")
ONCE = 1.05  # x the checkpoint

Told = Callable[[Workers], Callable[[int, int], None]]


def file_of(tmp_path: Path, name: str, **sizes: Any) -> Path:
    folder = tiny_checkpoint(tmp_path / "m", "llama", **(SIZES | sizes))
    return folder / SINGLE if name == SINGLE else write_gguf(folder, tmp_path / name, kind=Q8)


def work(file: Path) -> Work:
    model = str(file.parent if file.name == SINGLE else file)
    return Work(model, Pruning(sparsity=0.5, method="griffin"), Decoding(max_new_tokens=4))


def texts(file: Path) -> dict[int, str]:
    """What one process answers to every row."""
    asked = work(file)
    answers = asked.by(Engine(asked.model, PLACEMENT))
    return {row: answer["text"] for each in PROMPTS.values() for row, answer in answers.answer(each).items()}


def answer(
    file: Path, workers: int, host_memory: int | None = None, on_layer: Told = lambda _: lambda done, total: None
) -> tuple[dict[int, str], float]:
    """What workers answer, when the page cache has nothing; and what the disk gave them, x the checkpoint."""
    Engine(work(file).model)  # a GGUF file's headers are converted once
    leaves_the_cache(file)
    found, read = dict[int, Any](), 0
    places = cpu_places(replace(PLACEMENT, host_memory=host_memory), workers)
    with closing(Workers(work(file), places)) as processes:
        batch: Batch
        for batch, rows in processes.answer_all(PROMPTS, on_layer(processes), lambda told: None):
            assert set(batch) == set(rows)
            found |= rows
            read += rows.took.from_disk  # type: ignore[attr-defined]
    return {row: answer["text"] for row, answer in found.items()}, read / file.stat().st_size


@pytest.mark.parametrize(("name", "workers"), [(SINGLE, 2), ("m.gguf", 2)])
def test_the_disk_is_read_once(tmp_path: Path, name: str, workers: int) -> None:
    file = file_of(tmp_path, name)
    found, read = answer(file, workers)
    assert found == texts(file)
    assert 0.9 < read <= ONCE


def test_what_has_no_room_is_read_by_each(tmp_path: Path) -> None:
    """All prompts read the feed-forward blocks, which are most of it: 200 MiB."""
    file = file_of(tmp_path, SINGLE, hidden_size=512, intermediate_size=8192, num_hidden_layers=4)
    found, half = answer(file, 2, file.stat().st_size // 2)
    assert found == texts(file)
    _, none = answer(file, 2, 0)
    assert ONCE < half < none  # 8 prompts; how much the system reads ahead is its own affair
    assert none > 3


def test_a_worker_that_is_killed_while_it_reads_leaves_nothing_half_done(tmp_path: Path) -> None:
    file = file_of(tmp_path, SINGLE)
    killed: list[int] = []

    def kill(processes: Workers) -> Callable[[int, int], None]:
        first = processes._workers[0].process.pid

        def on_layer(done: int, total: int) -> None:
            if done == 1 and not killed:
                assert first
                killed.append(first)
                os.kill(first, signal.SIGKILL)

        return on_layer

    found, read = answer(file, 2, on_layer=kill)
    assert killed
    assert found == texts(file)
    assert read <= ONCE
    leaves_the_cache(file)  # it can go: nobody has a part of it


def test_what_it_takes_comes_off_the_budgets_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("griffin_offload.memory.machine.available_memory", lambda: 40_000 * MIB)
    free, less = (cpu_places(Placement("cpu", host_memory=size), 4) for size in (None, "4000MiB"))
    assert [place.placement.device_memory for place in free] == [9000 * MIB] * 4
    assert [place.placement.device_memory for place in less] == [8000 * MIB] * 4


def test_a_worker_beside_a_gpu_keeps_no_copy_of_its_own(tmp_path: Path) -> None:
    """The tier of all of them has the layers; copies, as a GPU needs, get them from there."""
    file = file_of(tmp_path, SINGLE)
    leaves_the_cache(file)
    first, second = (Engine(file.parent, copies=True, workers=2) for _ in range(2))
    texts = [
        engine.generate(tiny_prompt(40), sparsity=0.5, method="griffin", max_new_tokens=4).text
        for engine in (first, second, Engine(file.parent, copies=True))
    ]
    assert len(set(texts)) == 1
    assert first.resident.host_bytes == second.resident.host_bytes == 0
    assert first.bytes_from_disk + second.bytes_from_disk <= ONCE * file.stat().st_size
    assert second.bytes_from_disk < 0.01 * file.stat().st_size
    assert torch.equal(*(engine.kept_neurons()[0][0] for engine in (first, second)))
