"""One run of one method, in a process of its own: `python -m griffin_offload.evaluation.bench.competitors JOB`.

JOB is a `Job` as JSON. One line of JSON goes to stdout: what was measured, or {"error": why not}. Everything else goes
to stderr. Each method imports its own libraries, so that it holds no others."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import BudgetError, OptionError
from ...memory.machine import MARGIN, available_memory
from ...model.bandwidth import memory_bandwidth, read_by_a_token
from ...options import AUTO
from ...units import format_bytes
from .job import Clock, Deadline, Job, Usage
from .limits import arithmetic, device, new_memory, reading

OUT_OF_MEMORY = "out of memory"
READING_S = 10.0  # between an answer and the next prompt at most, as somebody reads; layers are page-locked meanwhile
NO_OFFLOAD = "on the CPU: this build of llama.cpp has no GPU support"


def full(job: Job) -> dict[str, Any]:
    """Plain transformers, the whole model on the device."""
    return _transformers(job, **({"device_map": {"": job.device}} if job.on_gpu else {}))


def accelerate(job: Job) -> dict[str, Any]:
    """transformers with accelerate: weights that do not fit are read for every token, from RAM or from disk."""
    memory: dict[int | str, int] = {"cpu": job.resident}
    if job.on_gpu:
        _cap(job)
        ram = int(available_memory() * (1 - MARGIN)) if job.ram is None else job.ram
        memory = {0 if job.device == "cuda" else job.device: job.resident, "cpu": ram}
    offload = str(Path(job.scratch) / "offload")
    return _transformers(job, device_map="auto", max_memory=memory, offload_folder=offload)


def _cap(job: Job) -> None:
    """Holds torch's allocator to the budget: beyond it, it is out of memory."""
    import torch

    if job.capped and job.device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.budget / total))


def _transformers(job: Job, **placement: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    _import_modules(job)
    usage = Usage(job.device)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype or "auto", **placement).eval()
    begin, clock = time.perf_counter(), Clock()
    ids = torch.tensor([job.prompt()], device=job.device)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **_greedy(job))
    result = usage.measured(begin - usage.start, clock.times, begin, clock.times[1] - begin)
    result["token_ids"] = text[0, ids.shape[1] :].tolist()
    if job.again:
        again = Clock()
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=again, max_new_tokens=1, do_sample=False)
        result["prompt_again_s"] = again.times[1] - again.times[0]
    weights = read_by_a_token(model)
    result["bytes_per_token"] = sum(w.numel() * w.element_size() for w in weights)
    whole = "max_memory" not in placement
    if whole and (job.on_gpu or result["peak_bytes"] <= job.budget):  # else the disk would be measured: mapped files
        result["memory_bandwidth"] = memory_bandwidth(weights)
    return result


def griffin(job: Job) -> dict[str, Any]:
    """This package, with the job's pruning, or lossless. Where the prompt is answered twice, the speed is the second
    answer's: the first one also prepares kernels."""
    from ...engine import Engine
    from ...planning.ladder import describe

    _import_modules(job)
    placed: dict[str, Any] = {"threads": job.threads} | ({} if job.ram is None else {"host_memory": job.ram})
    usage = Usage(job.device)
    engine = Engine(job.model, device=job.device, device_memory=job.budget, dtype=job.dtype, **placed)
    begin = time.perf_counter()
    usage.keep()
    peaks = [usage.peak]
    options = {"compile": job.compiles, "lossless": job.method == "lossless", **_greedy(job)}
    answer = engine.generate(job.prompt(), job.pruning, **options)
    report = answer.report
    first = begin + report.time_to_first_token_s
    # Between the first and the last token only the number of times counts.
    times = [first - report.prompt_s, *[first] * (report.tokens - 1), first + report.decode_s][: report.tokens + 1]
    result = usage.measured(begin - usage.start, times, begin, report.time_to_first_token_s)
    peaks.append(report.measured_peak)
    if job.again:
        result["first_decode_s"] = report.decode_s
        engine.resident.wait_for_locks(READING_S)
        report = engine.generate(job.prompt(), job.pruning, **options).report
        result |= {"prompt_again_s": report.prompt_s, "decode_s": report.decode_s, "tokens": report.tokens}
        usage.keep()  # of RAM: the device's peak is the report's
        peaks.append(report.measured_peak)
    chosen = job.pruning.sparsity is None or (job.pruning.rest in (None, AUTO) and report.plan.prunes)
    note = f"took {describe(report.plan)}" if chosen else ""
    if report.locked_host:
        note += f"{'; ' if note else ''}{format_bytes(report.locked_host)} of RAM page-locked"
    verified: dict[str, Any] = {}
    if report.lossless:
        note += f"; {report.lossless}"
        verified = {"lossless": report.lossless.to_json(), "streamed_per_token": report.lossless.bytes_per_token}
    return {
        **result,
        **({"note": note} if note else {}),
        **verified,
        "token_ids": answer.token_ids,
        **usage.peaks(max(peaks)),
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
        from llama_cpp import Llama, llama_supports_gpu_offload  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise OptionError("needs llama.cpp: pip install llama-cpp-python") from error
    offloads = job.on_gpu and llama_supports_gpu_offload()
    usage, free = Usage(job.device), _free(job.device)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    room = job.prompt_tokens + job.answer_tokens
    layers = job.gpu_layers if offloads else 0
    options = {"n_ctx": room, "n_threads": threads, "n_gpu_layers": layers, "logits_all": False, "use_mmap": True}
    llama = Llama(job.model, **options, verbose=False)
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
    if offloads:  # it allocates everything at the start, and not through torch
        result["peak_bytes"] = free - _free(job.device)
    elif job.on_gpu:
        result["note"] = NO_OFFLOAD
    return result | {"bytes_per_token": Path(job.model).stat().st_size}


def _free(device: str) -> int:
    """Free bytes of a CUDA device; 0 for others."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else 0


METHODS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "full": full,
    "accelerate": accelerate,
    "magnitude": griffin,
    "griffin": griffin,
    "lossless": griffin,
    "llama-cpp": llama_cpp,
    "reading": reading,
    "arithmetic": arithmetic,
    "device": device,
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


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    said = text[:300] or type(error).__name__
    if isinstance(error, BudgetError):
        return f"does not fit: {said}"
    lost = isinstance(error, MemoryError) or "can't allocate memory" in text or "CUDA out of memory" in text
    return OUT_OF_MEMORY if lost else said


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
