"""One run of one method, in a process of its own: `python -m griffin_offload.evaluation.bench.competitors JOB`.

JOB is a `Job` as JSON. One line of JSON goes to stdout: what was measured, or {"error": why not}. Everything else goes
to stderr. Each method imports its own libraries, so that it holds no others."""

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import BudgetError, OptionError
from ...memory.measure import PROC, PeakMeter, disk_bandwidth
from ...model.bandwidth import memory_bandwidth, read_by_a_token
from ...options import Pruning, as_dict, build
from ...sources.resolve import weight_files
from ...units import MIB

LAYERS = 4  # whose arithmetic is measured
SAMPLE = 512 * MIB  # to read when the disk is measured
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """What a child is to run. `model`: a folder, or the .gguf file for llama-cpp; `budget`, and `resident` (what
    accelerate may keep): bytes; `max_seconds`: no token begins later after the first; `scratch`: a folder for weights
    that accelerate writes; `pruning`: of Griffin's methods."""

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

    def prompt(self) -> list[int]:
        """The same random ids for every method."""
        ids = random.Random(0)
        return [ids.randrange(self.vocabulary) for _ in range(self.prompt_tokens)]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "pruning": as_dict(self.pruning)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        pruning = {name: tuple(v) if isinstance(v, list) else v for name, v in values.pop("pruning").items()}
        return cls(**values, pruning=build(Pruning, pruning))


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
    """What this process read, and the most memory it held, since this object was made."""

    def __init__(self) -> None:
        self.meter, self.before, self.start = PeakMeter("cpu"), _io(), time.perf_counter()

    def measured(self, load_s: float, times: list[float], begin: float, ttft_s: float) -> dict[str, Any]:
        """The measurements of a run. `times`: when the prompt pass began, and when each token came; `begin`: when the
        answer was asked for. `total_s`: what a user waits for, without the import of libraries."""
        peak = self.meter.peak()
        after = _io()
        return {
            "load_s": load_s,
            "prompt_s": times[1] - times[0],
            "ttft_s": ttft_s,
            "decode_s": times[-1] - times[1],
            "total_s": load_s + times[-1] - begin,
            "tokens": len(times) - 1,
            "peak_bytes": peak,
            "rchar": after.get("rchar", 0) - self.before.get("rchar", 0),
            "read_bytes": after.get("read_bytes", 0) - self.before.get("read_bytes", 0),
        }


def full(job: Job) -> dict[str, Any]:
    """Plain transformers, the whole model in memory."""
    return _transformers(job)


def accelerate(job: Job) -> dict[str, Any]:
    """transformers with accelerate: weights that do not fit are read from disk for every token."""
    return _transformers(
        job, device_map="auto", max_memory={"cpu": job.resident}, offload_folder=str(Path(job.scratch) / "offload")
    )


def _transformers(job: Job, **placement: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    _import_modules(job)
    usage = Usage()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype or "auto", **placement).eval()
    begin, clock = time.perf_counter(), Clock()
    ids = torch.tensor([job.prompt()])
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **_greedy(job))
    result = usage.measured(begin - usage.start, clock.times, begin, clock.times[1] - begin)
    weights = read_by_a_token(model)
    result["bytes_per_token"] = sum(w.numel() * w.element_size() for w in weights)
    if (
        not placement and result["peak_bytes"] <= job.budget
    ):  # else the disk would be measured: weights are mapped files
        result["memory_bandwidth"] = memory_bandwidth(weights)
    return result


def griffin(job: Job) -> dict[str, Any]:
    """This package, with the job's pruning."""
    from ...engine import Engine

    _import_modules(job)
    usage = Usage()
    engine = Engine(job.model, device="cpu", device_memory=job.budget, dtype=job.dtype)
    begin, opened = time.perf_counter(), usage.meter.peak()  # generate begins a peak of its own
    answer = engine.generate(job.prompt(), job.pruning, **_greedy(job))
    report = answer.report
    first = begin + report.time_to_first_token_s
    # Between the first and the last token only the number of times counts.
    times = [first - report.prompt_s, *[first] * (report.tokens - 1), first + report.decode_s][: report.tokens + 1]
    result = usage.measured(begin - usage.start, times, begin, report.time_to_first_token_s)
    return result | {
        "peak_bytes": max(opened, report.measured_peak),
        "planned_peak_bytes": report.plan.peak,
        "resident_bytes": report.plan.resident_bytes,
        "bytes_per_token": report.bytes_per_token,
        "skipped": report.skipped.share if report.skipped else 0.0,
        "read_bandwidth": report.read_bandwidth,
        "memory_bandwidth": report.memory_bandwidth,
        "fraction_of_limit": report.fraction_of_limit,
    }


def llama_cpp(job: Job) -> dict[str, Any]:
    """llama.cpp by its Python package, reading a GGUF file of the same weights. Raises OptionError without it."""
    try:
        from llama_cpp import Llama  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise OptionError("needs llama.cpp: pip install llama-cpp-python") from error
    usage = Usage()
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    room = job.prompt_tokens + job.answer_tokens
    llama = Llama(job.model, n_ctx=room, n_threads=threads, logits_all=False, use_mmap=True, verbose=False)
    begin = time.perf_counter()
    times = [begin]
    llama.eval(job.prompt())
    while True:
        token = llama.sample(temp=0.0)
        times.append(time.perf_counter())
        if len(times) > job.answer_tokens or times[-1] - times[1] >= job.max_seconds:
            break
        llama.eval([token])
    result = usage.measured(begin - usage.start, times, begin, times[1] - begin)
    return result | {"bytes_per_token": Path(job.model).stat().st_size}


def reading(job: Job) -> dict[str, Any]:
    """Bytes a second of reading the largest weights file in order: from the cache, unless runs are cold."""
    file = max(weight_files(Path(job.model)), key=lambda path: path.stat().st_size)
    if not job.cold:
        _read(file, 0)  # now it is there
        return {"bandwidth": _read(file, 0), "how": "page cache"}
    found = {"buffered": disk_bandwidth(file.parent, file, SAMPLE)}
    with suppress(OSError, AttributeError):  # the file system, or the system, has no direct reading
        found["direct"] = _read(file, os.O_DIRECT)
    how = max(found, key=lambda name: found[name])
    return {"bandwidth": found[how], "how": how}


def arithmetic(job: Job) -> dict[str, Any]:
    """Seconds of a prompt's products: the best of three passes over a few random layers, scaled to all layers."""
    import torch
    from transformers import AutoModelForCausalLM

    from ...model.pretrained import load_config, open_checkpoint
    from ...model.skeleton import compute_dtype

    config, path = load_config(Path(job.model)), Path(job.model)
    layers = config.num_hidden_layers
    few = min(LAYERS, layers)
    config.num_hidden_layers = few
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:few]
    # The head sees one token: a small one takes no time, where a large one would be counted with every layer.
    config.vocab_size, config.pad_token_id = min(config.vocab_size, 1024), None
    dtype = getattr(torch, job.dtype) if job.dtype else compute_dtype(open_checkpoint(path))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.tensor([[token % config.vocab_size for token in job.prompt()]])
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            model.base_model(ids)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best * layers / few, "threads": torch.get_num_threads()}


def new_memory(job: Job) -> dict[str, Any]:
    """Bytes a second at which the system hands out fresh memory: resident weights pay for it once."""
    from ...memory.arena import Arena

    memory, start = Arena(job.resident).memory, time.perf_counter()
    memory.fill_(1)
    return {"bandwidth": job.resident / (time.perf_counter() - start), "bytes": job.resident}


METHODS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "full": full,
    "accelerate": accelerate,
    "magnitude": griffin,
    "griffin": griffin,
    "llama-cpp": llama_cpp,
    "reading": reading,
    "arithmetic": arithmetic,
    "new-memory": new_memory,
}


def _import_modules(job: Job) -> None:
    """Imports what transformers would import late, before the clock starts."""
    import accelerate  # noqa: F401
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationMixin  # noqa: F401

    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(job.model))]


def _greedy(job: Job) -> dict[str, Any]:
    """Options of generate: exactly as many tokens as asked, each the likeliest, unless the deadline passes."""
    count = job.answer_tokens
    deadline = [Deadline(job.max_seconds)]
    return {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "stopping_criteria": deadline}


def _read(path: Path, flags: int) -> float:
    """Bytes a second of reading the first SAMPLE bytes into memory that is in use already. Raises OSError."""
    from ...memory.arena import Arena

    memory = Arena(64 * MIB).memory.fill_(0)  # whole pages, huge where the system has them
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        done, count, start = 0, len(memory), time.perf_counter()
        while done < SAMPLE and count == len(memory):  # less: the file's end
            count = os.preadv(fd, [memory.numpy().data], done)
            done += count
        return done / (time.perf_counter() - start)
    finally:
        os.close(fd)


def _io() -> dict[str, int]:
    """Linux's counts of bytes that this process read: `rchar` in all, `read_bytes` from the disk. Empty elsewhere."""
    with suppress(OSError):
        lines = (line.split(": ") for line in (PROC / "io").read_text().splitlines())
        return {name: int(count) for name, count in lines}
    return {}


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    said = text[:300] or type(error).__name__
    return f"does not fit: {said}" if isinstance(error, BudgetError) else said


def main(argument: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print: it must not mix with the result
    job = Job.from_json(argument)
    try:
        result = METHODS[job.method](job)
    except Exception as error:  # any library's: it becomes a row of the table
        traceback.print_exc()
        result = {"error": _describe(error)}
    print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
