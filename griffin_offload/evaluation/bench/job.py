"""What a child process is to run, and what it measures of itself."""

import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ...memory.measure import PROC, PeakMeter
from ...options import Pruning, as_dict, build


@dataclass(frozen=True)
class Job:
    """What a child is to run. `model`: a folder, or the .gguf file for llama-cpp; `budget`, and `resident` (what
    accelerate may keep on the device): bytes; `max_seconds`: no token begins later after the first; `scratch`: a folder
    for weights that accelerate writes; `pruning`: of Griffin's methods.

    `ram`: bytes of RAM for weights, None: what is free; `capped`: the device's allocator is held to the budget;
    `gpu_layers`: layers that llama.cpp puts on the GPU, -1: all; `compiles`: Griffin compiles its layers;
    `threads`: Griffin's, None: as many as fit the moment; `ids`: of the prompt, () for random ones."""

    method: str
    model: str
    prompt_tokens: int
    answer_tokens: int
    vocabulary: int
    budget: int
    resident: int
    max_seconds: float
    dtype: str | None
    scratch: str
    cold: bool
    pruning: Pruning = Pruning()  # noqa: RUF009 - frozen
    device: str = "cpu"
    ram: int | None = None
    capped: bool = False
    gpu_layers: int = 0
    compiles: bool = False
    threads: int | None = None
    ids: Sequence[int] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def again(self) -> bool:
        """Whether the prompt is answered twice in one process: the second pass finds weights in RAM."""
        return self.on_gpu or bool(self.ram)

    def prompt(self) -> list[int]:
        """The same ids for every method."""
        if self.ids:
            return list(self.ids)
        ids = random.Random(0)
        return [ids.randrange(self.vocabulary) for _ in range(self.prompt_tokens)]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "pruning": as_dict(self.pruning)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        pruning = {name: tuple(v) if isinstance(v, list) else v for name, v in values.pop("pruning").items()}
        ids = tuple(values.pop("ids"))
        return cls(**values, ids=ids, pruning=build(Pruning, pruning))


class Clock:
    """A streamer of transformers' generate that takes the time of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing waits."""


class Deadline:
    """A stopping criterion of transformers' generate: no token begins later than `seconds` after the first."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.first = seconds, 0.0

    def __call__(self, ids: Any, scores: Any, **more: Any) -> Any:
        now = time.perf_counter()
        self.first = self.first or now
        return ids.new_full((len(ids),), now - self.first >= self.seconds).bool()


class Usage:
    """What this process read, and the most memory it held on the device and in RAM, since this object was made."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.peak, self.ram_peak = device, 0, 0
        self.meter, self.ram = PeakMeter(device), PeakMeter("cpu")
        self.before, self.start = _io(), time.perf_counter()

    def keep(self) -> None:
        """Remembers the peaks so far: an Engine begins peaks of its own."""
        self.peak, self.ram_peak = max(self.peak, self.meter.peak()), max(self.ram_peak, self.ram.peak())

    def measured(self, load_s: float, times: list[float], begin: float, ttft_s: float) -> dict[str, Any]:
        """The measurements of a run. `times`: when the prompt pass began, and when each token came; `begin`: when the
        answer was asked for. `total_s`: what a user waits for, without the import of libraries."""
        self.keep()
        after = _io()
        return {
            "load_s": load_s,
            "prompt_s": times[1] - times[0],
            "ttft_s": ttft_s,
            "decode_s": times[-1] - times[1],
            "total_s": load_s + times[-1] - begin,
            "tokens": len(times) - 1,
            "rchar": after.get("rchar", 0) - self.before.get("rchar", 0),
            "read_bytes": after.get("read_bytes", 0) - self.before.get("read_bytes", 0),
            **self.peaks(self.peak),
        }

    def peaks(self, peak: int) -> dict[str, int]:
        """The peak of the device, and for a GPU that of RAM."""
        return {"peak_bytes": peak} if self.device == "cpu" else {"peak_bytes": peak, "ram_peak_bytes": self.ram_peak}


def _io() -> dict[str, int]:
    """Linux's counts of bytes that this process read: `rchar` in all, `read_bytes` from the disk. Empty elsewhere."""
    with suppress(OSError):
        lines = (line.split(": ") for line in (PROC / "io").read_text().splitlines())
        return {name: int(count) for name, count in lines}
    return {}
