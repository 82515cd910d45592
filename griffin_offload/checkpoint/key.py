"""A fingerprint of a checkpoint, without reading it whole."""

import hashlib
import os

from .headers import Checkpoint

SAMPLES, SAMPLE_BYTES = 16, 4096  # of the weights, for a checkpoint's key


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """SHA-256, as hex, of what tells checkpoints apart without reading them whole: config.json, every tensor's name,
    dtype, shape and place, and a sample of the weights (16 tensors, 4 KiB in the middle of each).

    It notices another size, format or precision, and any training that moved one of the sampled tensors there; it
    does not notice a change to the others alone. Moving or renaming the folder changes nothing."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
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
