"""One safetensors file of our own: written tensor by tensor, whole or not at all, and read with its checksums."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import GriffinError
from ..files import reason, write_at, write_whole
from ..inputs import require_plain
from ..small_json import parse_object
from .reader import as_bytes
from .safetensors_writer import NAMES

Tensors = Mapping[str, Tensor]


def write_file(path: Path, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    """Writes tensors and facts (JSON types) to a file that its owner alone can read, one tensor in RAM at a time.

    Raises OSError."""
    sums: dict[str, int] = {}
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
        sums[name] = zlib.crc32(_bytes(tensor))
    metadata = {"facts": json.dumps(facts), "crc32": json.dumps(sums)}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with write_whole(path, sync=True) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_at(descriptor, memoryview(len(header).to_bytes(8, "little") + header), 0)
            offset = 8 + len(header)
            for tensor in tensors.values():
                write_at(descriptor, _bytes(tensor), offset)
                offset += tensor.nbytes
        finally:
            os.close(descriptor)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone. Raises GriffinError for a file that `write_file` did not write."""
    with _open(path) as (_, metadata):
        return parse_object(metadata["facts"])


@contextmanager
def reading(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yields what reads a tensor by name. Raises GriffinError, from within the block too, for a damaged file."""
    with _open(path) as (file, metadata):
        sums = parse_object(metadata["crc32"])

        def read(name: str) -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            if zlib.crc32(_bytes(tensor)) != sums[name]:
                raise ValueError(f"{name} is not what was written")
            return tensor

        yield read


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    try:
        require_plain(path)
        with safe_open(path, "pt") as file:
            yield file, file.metadata() or {}
    except FileNotFoundError:
        raise GriffinError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
        raise GriffinError(f"{path} is damaged, or not a file of Griffin's ({reason(error)})") from error


def _bytes(tensor: Tensor) -> memoryview:
    return as_bytes(tensor.cpu().contiguous()).numpy().data
