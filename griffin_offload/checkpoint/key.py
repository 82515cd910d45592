"""A fingerprint of a checkpoint, without reading it whole."""

import hashlib
import os
from pathlib import Path

from ..errors import CheckpointError
from ..files import reason
from ..inputs import SETTINGS
from .headers import Checkpoint
from .identity import OPEN, require_same

SAMPLES, SAMPLE_BYTES = 16, 4096
_KEY = "_checkpoint_key"


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """SHA-256, in hex, of config.json, of every tensor's name, dtype, shape and place, and of 4 KiB in 16 tensors each.

    It changes with size, format or precision, and with training that changed one of the sampled places. It does not
    change with the folder's name or place.

    Made once: later it is still that of the weights that were opened, whatever the folder holds by then. Raises
    CheckpointError for a file that has changed before that."""
    if _KEY not in vars(checkpoint):  # a copy with other fields is without it
        vars(checkpoint)[_KEY] = _made(checkpoint)
    return str(vars(checkpoint)[_KEY])


def _made(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(_read(checkpoint, checkpoint.folder / "config.json", 0, SETTINGS))
    tensors = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    for info in tensors:
        place = (info.name, str(info.dtype), info.shape, info.file.name, info.begin, info.end)
        digest.update(repr(place).encode())
    for index in range(min(SAMPLES, len(tensors))):
        info = tensors[index * len(tensors) // min(SAMPLES, len(tensors))]
        middle = info.begin + info.bytes // 2
        digest.update(_read(checkpoint, info.file, middle, min(SAMPLE_BYTES, info.end - middle)))
    return digest.hexdigest()


def _read(checkpoint: Checkpoint, path: Path, begin: int, count: int) -> bytes:
    try:
        descriptor = os.open(path, OPEN)
        try:
            require_same(path, os.fstat(descriptor), checkpoint.files)
            return os.pread(descriptor, count, begin)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
