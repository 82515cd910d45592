"""What was measured of this machine, kept in a JSON file of the cache folder: an entry for each device and dtype."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..small_json import need, read_object
from ..version import __version__
from .measure import processor_name

DAY = 24 * 3600  # seconds that a measurement counts before another one joins it


def machine_key(device: str, dtype: torch.dtype) -> str:
    """What speeds depend on. A new version may bring new kernels."""
    if device == "cpu":
        what = f"{processor_name()}, {instructions()}, {torch.get_num_threads()} threads"
    else:
        what = f"{torch.cuda.get_device_name() if device == 'cuda' else processor_name()}, {device}"
    number = str(dtype).removeprefix("torch.")
    return f"{what}, {number}, torch {torch.__version__}, griffin {__version__}"


def instructions() -> str:
    """The instructions that torch and oneDNN use on this processor: oneDNN's may be limited by a variable."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return torch.backends.cpu.get_cpu_capability() + (f", oneDNN at most {limit}" if limit else "")


def read_entry(path: Path, key: str) -> tuple[float, dict[str, Any]]:
    """Age in seconds, and the entry: empty where the file has none."""
    with suppress(OSError, ValueError):
        entry: dict[str, Any] = need(read_object(path), key, dict)
        return time.time() - need(entry, "time", float), entry
    return 0.0, {}


def add_entry(path: Path, key: str, **values: Any) -> None:
    """Adds an entry to the file, or begins a new one where it is broken. What cannot be written is not kept.

    `time` among the values: when it was measured; default: now."""
    entries: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        entries = read_object(path)
    entries[key] = {"time": time.time(), **values}
    with suppress(OSError):
        write_text(path, json.dumps(entries, indent=1))
