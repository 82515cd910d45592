"""A fingerprint of a checkpoint, without reading it whole."""

import hashlib
import os

from ..inputs import read_input
from .headers import Checkpoint

SAMPLES, SAMPLE_BYTES = 16, 4096


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """SHA-256, in hex, of config.json, of every tensor's name, dtype, shape and place, and of 4 KiB in 16 tensors each.

    It changes with size, format or precision, and with training that changed one of the sampled places. It does not
    change with the folder's name or place."""
    digest = hashlib.sha256(read_input(checkpoint.folder / "config.json"))
    tensors = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    for info in tensors:
        place = (info.name, str(info.dtype), info.shape, info.file.name, info.begin, info.end)
        digest.update(repr(place).encode())
    for index in range(min(SAMPLES, len(tensors))):
        info = tensors[index * len(tensors) // min(SAMPLES, len(tensors))]
        with info.file.open("rb", buffering=0) as file:
            middle = info.begin + info.bytes // 2
            digest.update(os.pread(file.fileno(), min(SAMPLE_BYTES, info.end - middle), middle))
    return digest.hexdigest()
