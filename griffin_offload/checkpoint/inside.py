"""Whether a file lies in a checkpoint's folder. A checkpoint comes from somebody else: what its index names, and what a
link in it points to, could be any file of the user's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..foreign import NAME, shown

LONGEST = 255  # bytes of a name, on every usual file system


def inside(folder: Path, path: Path) -> bool:
    """Whether a path stays in a folder, its links followed. In the hub's cache, links from snapshots/ to blobs/ of the
    same model do. Raises OSError for links without an end."""
    root = folder.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    try:
        real = path.resolve()
    except RuntimeError as error:  # a link to itself, before Python 3.13
        raise OSError(str(error)) from None
    return any(real.is_relative_to(place) for place in allowed)


def weights_inside(folder: Path, name: str, index: str) -> Path:
    """The path of a file of weights, which `index` names ('': nothing does). Raises CheckpointError for a file
    elsewhere."""
    what = f"{folder / index} names {shown(name, NAME)}" if index else f"{folder / name} is a link"
    try:
        stays = name.isprintable() and len(name.encode()) <= LONGEST and inside(folder, folder / name)
    except (OSError, ValueError):
        raise CheckpointError(f"{what}, which cannot be opened: its links have no end") from None
    if not stays:
        raise CheckpointError(f"{what}, which leaves the folder; do not trust this checkpoint")
    return folder / name


def require_own_names(facts: Mapping[str, Any], key: str, where: Path) -> None:
    """Raises CheckpointError unless a field, of those that name other files to read, names files of the folder."""
    for name in facts.get(key) or ():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{where}: {key} names {shown(repr(name), NAME)}, which is no file of the folder")
