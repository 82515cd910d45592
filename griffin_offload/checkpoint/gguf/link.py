"""A model whose weights stay in a GGUF file: its folder in our cache has a note that says where each tensor is.

The note is read without torch, for `griffin models` and `griffin pull`."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...files import reason
from ...inputs import VOCABULARY
from ...paths import cache_folder, has_config
from ...small_json import read_object

if TYPE_CHECKING:
    from ..headers import Checkpoint, TensorInfo

NOTE = "griffin_source.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a GGUF file: bytes [begin, begin + bytes), of gguf's type `kind`, with transformers' shape.

    llama.cpp's changes: if `heads` is not 0, the rows of each head's two halves alternate (q and k, for its rotary
    code); `offset` was added to every number (Gemma's norms)."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    bytes: int
    heads: int = 0
    offset: float = 0.0

    def info(self, name: str, file: Path) -> "TensorInfo":
        """The tensor for the reader. Only float32 and bfloat16 as they are need no decoding.

        Everything else becomes bfloat16, float16 too: its models were mostly trained in bfloat16, and a CPU multiplies
        float16 15 times as slowly (78 ms, not 5, for 256 tokens through 2048 x 2048)."""
        import torch

        from ..headers import Encoding, TensorInfo

        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(self.kind)
        plain = dtype and not self.heads and not self.offset
        encoding = None if plain else Encoding(self.kind, self.heads, self.offset)
        end = self.begin + self.bytes
        return TensorInfo(name, dtype or torch.bfloat16, self.shape, file, self.begin, end, encoding)


@dataclass(frozen=True)
class Link:
    """The note. `size` and `mtime_ns` of the file when it was made; `tensors` by transformers' names."""

    file: Path
    size: int
    mtime_ns: int
    tensors: dict[str, StoredTensor]

    @classmethod
    def of(cls, file: Path, tensors: dict[str, StoredTensor]) -> "Link":
        stat = file.stat()
        return cls(Path(os.path.realpath(file)), stat.st_size, stat.st_mtime_ns, tensors)

    def open(self, folder: Path) -> "Checkpoint":
        """The checkpoint of the folder that has this note. Raises CheckpointError if the file is gone or changed."""
        from ..headers import Checkpoint
        from ..identity import Identity, identities

        files = identities(folder) | {self.file: Identity.of(self.require_file())}
        tensors = {name: t.info(name, self.file) for name, t in self.tensors.items()}
        return Checkpoint(folder, tensors, self.size, files=files)

    def require_file(self) -> os.stat_result:
        """The file as it is. Raises CheckpointError if it is gone or changed."""
        try:
            stat = self.file.stat()
        except OSError as error:
            raise CheckpointError(f"{self.file}, which holds the weights, cannot be opened: {reason(error)}") from None
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointError(f"{self.file} has changed since it was first read; give the file itself as the model")
        return stat


def write_link(folder: Path, link: Link) -> None:
    note = {"source": str(link.file), "size": link.size, "mtime_ns": link.mtime_ns}
    tensors = {name: asdict(tensor) for name, tensor in link.tensors.items()}
    (folder / NOTE).write_text(json.dumps(note | {"tensors": tensors}))


def read_link(folder: Path) -> Link | None:
    """The note in a folder, or None. Only notes in our own folders can be trusted."""
    try:
        note = read_object(folder / NOTE, VOCABULARY)
        tensors = {name: StoredTensor(**t | {"shape": tuple(t["shape"])}) for name, t in note["tensors"].items()}
        return Link(Path(note["source"]), int(note["size"]), int(note["mtime_ns"]), tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def gguf_link(folder: Path) -> Link | None:
    """The note in a folder that `resolve` made for a GGUF file; None for every other folder, whose note could name any
    file."""
    ours = os.path.dirname(os.path.realpath(folder)) == os.path.realpath(cache_folder() / "gguf")
    return read_link(folder) if ours and has_config(folder) else None
