"""What a prompt pass through a large model costs the host beside moving its bytes, in milliseconds. Needs no GPU.

python scripts/prompt-pass-host.py [ALIAS] [--threads 12] [--rounds 5] [--profile FILE]

The lines that run beside a GPU, with plain copies in place of streams, twice. `whole`: the model's true shape, whose
checkpoint is a sparse file and whose device is torch's `meta`, which has no memory. A read and a copy in RAM move a few
bytes, a copy to the device moves none, and nothing is computed: so the pieces are as many as on a GPU, and what is left
is Python, calls of the system and locks. `narrow`: a 32nd of the hidden size and as many layers, on the CPU, with all
that the computing thread does: forward, statistic, choice and gathering of neurons.

Processor time of three: staging, which prepares the pass; computing, by the computing thread; reading, by all reading
threads together. Python runs one thread at a time, so that no pass is shorter than their sum."""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, DynamicCache

from griffin_offload.checkpoint.reader import Reader
from griffin_offload.memory.host_cache import HostTier
from griffin_offload.memory.upload import IN_FLIGHT, PIECE, Ring
from griffin_offload.model.pretrained import read_headers
from griffin_offload.model.skeleton import Skeleton
from griffin_offload.offload import layer_stream
from griffin_offload.offload.layer_hook import LayerHook
from griffin_offload.offload.layer_stream import LayerStream
from griffin_offload.offload.pruner import Pruner
from griffin_offload.offload.resident_layer import resident_layers
from griffin_offload.offload.sweep import Sweep
from griffin_offload.pruning.selection import Selection
from griffin_offload.sources.catalogue import CATALOGUE

PAGE = 4096


def sparse_checkpoint(fields: dict[str, Any], folder: Path) -> None:
    """A checkpoint of this config, whose weights are holes of a file."""
    config = AutoConfig.for_model(**fields)
    config.save_pretrained(folder)
    layout, header, end = Skeleton(config, torch.bfloat16).layout, {}, 0
    for name, shape in layout.shapes.items():
        if name not in layout.aliases:
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def move_nothing() -> None:
    """Reads and copies in RAM call the system and numpy as ever, for a few bytes that nobody uses, and tell that they
    moved all."""
    preadv, copyto = os.preadv, np.copyto
    source = np.zeros(PAGE, np.uint8)

    def read(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        preadv(fd, [bytearray(1)], 0, flags)
        return sum(map(len, buffers))

    os.preadv, np.copyto = read, lambda *_: copyto(np.empty(PAGE, np.uint8), source)  # type: ignore[assignment]


class Pass:
    """Prompt passes of one model, half of whose neurons stay."""

    def __init__(self, folder: Path, ring: Ring, device: str) -> None:
        checkpoint = read_headers(folder).checkpoint
        config = AutoConfig.from_pretrained(folder)
        self.skeleton, self.device, self.files = Skeleton(config, torch.bfloat16), device, checkpoint.files
        self.skeleton.bind(checkpoint)
        self.tier = HostTier()
        self.kept = tuple((layer.whole[0] // 2,) for layer in self.skeleton.layers)
        for name in self.skeleton.layout.outer:
            shape = self.skeleton.layout.shapes[name]
            self.skeleton.slots.assign(name, torch.empty(shape, dtype=torch.bfloat16, device=device))
        layer_stream.ring_for = lambda *_: ring  # type: ignore[attr-defined]
        self.forget()

    def forget(self) -> None:
        """Nothing is resident any more; the tier keeps its layers."""
        self.layers = resident_layers(self.skeleton.layout, self.kept, [self.device] * len(self.kept))

    def run(self, forward: Callable[[LayerStream], object]) -> dict[str, float]:
        """Milliseconds of one pass. `reading`, `computing`: of processor time of the threads that do it."""
        readers = ReaderTimes()
        began, used = time.perf_counter(), time.thread_time()
        reader = Reader(direct=True, files=self.files)
        stream = LayerStream(self.skeleton, reader, self.layers, copies=True, steady=False, tier=self.tier)
        staged = time.thread_time() - used
        pieces = sum(len(load.jobs) for load in stream._staging.loads())  # type: ignore[misc, union-attr]
        with readers:
            forward(stream)
        total, used = time.perf_counter() - began, time.thread_time() - used
        reader.close()
        seconds = {"wall": total, "staging": staged, "computing": used - staged, "reading": readers.seconds}
        return {"pieces": pieces} | {name: 1000 * s for name, s in seconds.items()}

    def pass_by(self, stream: LayerStream) -> None:
        """Every layer comes and goes, and nothing is computed."""
        stream.open(Sweep(stream, LayerHook()))
        for index in range(len(self.kept)):
            stream.onload(index)
            stream.release(index)

    def compute(self, stream: LayerStream, tokens: int) -> None:
        """A prompt of so many tokens, whose neurons are kept."""
        pruner = Pruner(self.skeleton.layout, self.skeleton.modules, self.layers, Selection())
        states = torch.zeros(1, tokens, self.skeleton.config.hidden_size, dtype=torch.bfloat16)
        with Sweep(stream, pruner), torch.no_grad():
            self.skeleton.model.model(inputs_embeds=states, past_key_values=DynamicCache(), use_cache=True)


class ReaderTimes:
    """Seconds of processor time of the threads that start and end meanwhile."""

    def __enter__(self) -> None:
        self.seconds, self._run = 0.0, threading.Thread.run
        lock = threading.Lock()

        def run(thread: threading.Thread) -> None:
            self._run(thread)
            with lock:
                self.seconds += time.thread_time()

        threading.Thread.run = run  # type: ignore[assignment, method-assign]

    def __exit__(self, *exc: object) -> None:
        threading.Thread.run = self._run  # type: ignore[method-assign]


def profiled(run: Any, file: str) -> None:
    """Runs with a profile of every thread, the reading threads' added up; writes a table for each kind."""
    import cProfile
    import io
    import pstats

    readers: list[cProfile.Profile] = []
    inner = threading.Thread.run

    def outer(self: threading.Thread) -> None:
        readers.append(profile := cProfile.Profile(time.thread_time))
        profile.runcall(inner, self)

    threading.Thread.run = outer  # type: ignore[method-assign]
    own = cProfile.Profile(time.thread_time)
    own.runcall(run)
    threading.Thread.run = inner  # type: ignore[method-assign]
    text = io.StringIO()
    for title, each in (("computing", [own]), ("reading", readers)):
        text.write(f"\n==== {title}: {len(each)} thread(s)\n")
        stats = pstats.Stats(*each, stream=text)
        for order in ("tottime", "cumtime"):
            stats.sort_stats(order).print_stats(45)
    Path(file).write_text(text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("alias", nargs="?", default="llama-2-13b")
    parser.add_argument("--threads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| pass | " + " | ".join(("pieces", "wall", "staging", "computing", "reading")) + " |")
    config = CATALOGUE[asked.alias].config
    with tempfile.TemporaryDirectory() as folder:
        narrow = {"hidden_size": config["hidden_size"] // 32, "intermediate_size": config["intermediate_size"] // 32}
        sparse_checkpoint(config | narrow, Path(folder))
        ring = Ring(asked.threads, asked.threads + IN_FLIGHT, PIECE // 32**2)
        passes = Pass(Path(folder), ring, "cpu")
        show("narrow", passes, lambda stream: passes.compute(stream, 16), asked)
    with tempfile.TemporaryDirectory() as folder:
        sparse_checkpoint(config, Path(folder))
        move_nothing()
        whole = Pass(Path(folder), Ring(asked.threads, asked.threads + IN_FLIGHT, PIECE), "meta")
        show("whole", whole, whole.pass_by, asked)


def show(name: str, passes: Pass, forward: Callable[[LayerStream], object], asked: argparse.Namespace) -> None:
    for where in ("page cache", "RAM"):
        if where == "RAM":
            passes.tier.hold(len(passes.kept), len(passes.kept))
            passes.run(forward)  # which fills the tier
        found = []
        for _ in range(asked.rounds):
            if where == "page cache":
                passes.forget()
            found.append(passes.run(forward))
        best = {key: min(each[key] for each in found) for key in found[0]}
        print(f"| {name}, {where} | " + " | ".join(f"{value:.0f}" for value in best.values()) + " |", flush=True)
        if asked.profile:
            if where == "page cache":
                passes.forget()
            profiled(lambda: passes.run(forward), f"{asked.profile}.{name}.{where}")


if __name__ == "__main__":
    main()
