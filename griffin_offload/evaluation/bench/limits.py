"""What limits every method on this machine: disk, page cache, bus, memory and arithmetic. Each in a child process."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...memory.measure import disk_bandwidth
from ...memory.measured import instructions
from ...model.bandwidth import memory_bandwidth_here, wait_for
from ...sources.resolve import weight_files
from ...units import GIB, MIB
from .job import Job

LAYERS = 4  # whose arithmetic is measured
SAMPLE = 512 * MIB  # read by each thread when disk and page cache are measured
READERS = (1, 4, 8)  # threads that feed a GPU; on the CPU one does
PINNED = 256 * MIB  # copied when the bus is measured


def reading(job: Job) -> dict[str, Any]:
    """Bytes a second of reading the largest weights file in order: from the cache, unless runs are cold. For a GPU by
    as many threads as are fastest, and `page_cache` beside the disk."""
    file = max(weight_files(Path(job.model)), key=lambda path: path.stat().st_size)
    readers = READERS if job.on_gpu else (1,)
    if not job.cold:
        return {"bandwidth": _page_cache(file, readers), "how": "page cache"}
    found = {"buffered": disk_bandwidth(file.parent, file, SAMPLE)}
    with suppress(OSError, AttributeError):  # the file system, or the system, has no direct reading
        found["direct"] = max(_read(file, os.O_DIRECT, count) for count in readers)
    how = max(found, key=lambda name: found[name])
    cached = {"page_cache": _page_cache(file, readers)} if job.on_gpu else {}
    return {"bandwidth": found[how], "how": how, **cached}


def _page_cache(file: Path, readers: tuple[int, ...]) -> float:
    _read(file, 0, readers[-1])  # now it is there
    return max(_read(file, 0, count) for count in readers)


def _read(path: Path, flags: int, readers: int = 1) -> float:
    """Bytes a second of reading SAMPLE bytes by each of some threads, one behind the other in the file, into memory
    that is in use already. Raises OSError."""
    from ...memory.arena import Arena

    memories = [Arena(64 * MIB).memory.fill_(0) for _ in range(readers)]  # whole pages, huge where the system has them
    fd = os.open(path, os.O_RDONLY | flags)

    def read(number: int) -> int:
        memory, begin, done = memories[number], number * SAMPLE, 0
        count = len(memory)
        while done < SAMPLE and count == len(memory):  # less: the file's end
            count = os.preadv(fd, [memory.numpy().data], begin + done)
            done += count
        return done

    try:
        with ThreadPoolExecutor(readers) as pool:
            start = time.perf_counter()
            done = sum(pool.map(read, range(readers)))
            return done / (time.perf_counter() - start)
    finally:
        os.close(fd)


def arithmetic(job: Job) -> dict[str, Any]:
    """Seconds of a prompt's products: the best of three passes over a few random layers, scaled to all layers. On a
    CPU by the products that Griffin chooses, those that were measured to be the quickest here."""
    import torch
    from transformers import AutoModelForCausalLM

    from ...model.compute_dtype import compute_dtype
    from ...model.modules import multiply_by_the_quicker_way
    from ...model.pretrained import read_headers
    from ...quant.products import choose, chosen

    headers = read_headers(Path(job.model))
    config, checkpoint = headers.config, headers.checkpoint
    layers = config.num_hidden_layers
    few = min(LAYERS, layers)
    config.num_hidden_layers = few
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:few]
    # The head sees one token: a small one takes no time, where a large one would be counted with every layer.
    config.vocab_size, config.pad_token_id = min(config.vocab_size, 1024), None
    dtype, _ = compute_dtype(checkpoint, job.device, job.dtype)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    facts = {}
    if job.device == "cpu":
        if choose(dtype, checkpoint.bytes):
            multiply_by_the_quicker_way(model)
        facts = {"instructions": processor_instructions(), "products": chosen(dtype)}
    ids = torch.tensor([[token % config.vocab_size for token in job.prompt()]], device=job.device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            model.base_model(ids)
        wait_for(job.device)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best * layers / few, "threads": torch.get_num_threads(), **facts}


def processor_instructions() -> str:
    """What torch and oneDNN use of this processor, and what else it has for products in half precision."""
    import torch

    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    others = [name for name in ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16") if has.get(name)]
    return f"{instructions()}; the processor has {', '.join(others) or 'none for half precision'}"


def device(job: Job) -> dict[str, Any]:
    """The device's name and driver, the bytes a second of the bus to it (from pinned RAM, the best of five copies) and
    of its memory (one token's product)."""
    import torch

    cuda = job.device == "cuda"
    host = torch.ones(PINNED, dtype=torch.uint8, pin_memory=cuda)
    there = torch.empty(PINNED, dtype=torch.uint8, device=job.device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        wait_for(job.device)
        best = min(best, time.perf_counter() - start)
    facts = {"name": torch.cuda.get_device_name(), "driver": _driver()} if cuda else {"name": job.device}
    total = {"total_bytes": torch.cuda.mem_get_info()[1]} if cuda else {}
    bandwidth = memory_bandwidth_here(job.device, GIB if cuda else PINNED)
    return {**facts, **total, "bus_bandwidth": PINNED / best, "memory_bandwidth": bandwidth}


def _driver() -> str | None:
    """The version of NVIDIA's driver, by its own tool; None without it."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        return found.stdout.split("\n")[0].strip() or None
    return None


def new_memory(job: Job) -> dict[str, Any]:
    """Bytes a second at which the system hands out fresh memory: resident weights pay for it once."""
    from ...memory.arena import Arena

    memory, start = Arena(job.resident).memory, time.perf_counter()
    memory.fill_(1)
    return {"bandwidth": job.resident / (time.perf_counter() - start), "bytes": job.resident}
