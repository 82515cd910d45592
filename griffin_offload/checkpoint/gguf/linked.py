"""A GGUF file as a checkpoint that is read in place: a note of our cache (sources/gguf_link.py) -> TensorInfo."""

from pathlib import Path

import torch

from ..headers import Checkpoint, Encoding, TensorInfo
from .link import Link, StoredTensor

# bfloat16 also for float16: what it holds was mostly trained in bfloat16, and products of float16 take a CPU 15 times
# as long (78 ms, not 5, for 256 tokens through 2048 x 2048).
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16}


def open_linked(folder: Path, link: Link) -> Checkpoint:
    """The checkpoint of a folder whose weights are in a GGUF file. Raises CheckpointError if the file is not there."""
    link.require_file()
    return Checkpoint(folder, {n: tensor_info(n, t, link.file) for n, t in link.tensors.items()}, link.size)


def tensor_info(name: str, stored: StoredTensor, file: Path) -> TensorInfo:
    plain = stored.kind in PLAIN and not stored.heads and not stored.offset
    return TensorInfo(
        name,
        PLAIN.get(stored.kind, torch.bfloat16),
        stored.shape,
        file,
        stored.begin,
        stored.begin + stored.bytes,
        None if plain else Encoding(stored.kind, stored.heads, stored.offset),
    )
