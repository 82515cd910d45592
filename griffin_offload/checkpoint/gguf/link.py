"""The note in a folder of our cache whose weights stay in a GGUF file: which file, and where each tensor lies in it.

Read without torch: `griffin models` and `griffin pull` need no more."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import CheckpointError
from ...paths import cache_folder, has_config

NOTE = "griffin_source.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a GGUF file: bytes [begin, begin + bytes), of gguf's type `kind`, with transformers' shape.

    What llama.cpp changed: with `heads`, the rows of each head's halves lie in turn (q and k, for its rotary code);
    `offset` was added to every number (Gemma's norms)."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    bytes: int
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Link:
    """`size` and `mtime_ns`: the file's when the note was made. `tensors`: by transformers' names."""

    file: Path
    size: int
    mtime_ns: int
    tensors: dict[str, StoredTensor]

    @classmethod
    def of(cls, file: Path, tensors: dict[str, StoredTensor]) -> "Link":
        stat = file.stat()
        return cls(file.resolve(), stat.st_size, stat.st_mtime_ns, tensors)

    def require_file(self) -> None:
        """Raises CheckpointError where the file is gone, or is another than the note was made for."""
        try:
            stat = self.file.stat()
        except OSError as error:
            raise CheckpointError(f"{self.file}, which holds the weights, cannot be opened: {error.strerror}") from None
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointError(f"{self.file} has changed since it was first read; give the file itself as the model")


def write_link(folder: Path, link: Link) -> None:
    note = {"source": str(link.file), "size": link.size, "mtime_ns": link.mtime_ns}
    tensors = {name: asdict(tensor) for name, tensor in link.tensors.items()}
    (folder / NOTE).write_text(json.dumps(note | {"tensors": tensors}))


def read_link(folder: Path) -> Link | None:
    """None where the folder has no such note. The caller sees to it that the folder is our own."""
    try:
        note = json.loads((folder / NOTE).read_bytes())
        tensors = {name: StoredTensor(**t | {"shape": tuple(t["shape"])}) for name, t in note["tensors"].items()}
        return Link(Path(note["source"]), int(note["size"]), int(note["mtime_ns"]), tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def gguf_link(folder: Path) -> Link | None:
    """Which GGUF file holds the weights of a folder that `resolve` made for one. None for every other folder: what
    somebody else's says of files elsewhere is not believed."""
    ours = folder.resolve().parent == (cache_folder() / "gguf").resolve()
    return read_link(folder) if ours and has_config(folder) else None
