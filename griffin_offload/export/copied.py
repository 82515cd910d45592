"""Which files of a model's folder go into an export, and none that a link there only points to."""

import os
from fnmatch import fnmatch
from pathlib import Path

from ..checkpoint.identity import Files, require_same
from ..checkpoint.inside import inside
from ..errors import ExportError
from ..files import reason

COPIED = """tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.model chat_template*
    generation_config.json LICENSE* USE_POLICY* NOTICE*""".split()  # noqa: SIM905
READ = ("config.json", "processor_config.json")  # parts of them are written too


def copied_files(folder: Path, files: Files) -> list[Path]:
    """The files that go into an export as they are. `files`: the folder's as they were when the model was opened.

    Raises ExportError for one that is a link out of the folder, CheckpointError for one that has changed."""
    try:
        names = sorted(os.listdir(folder))  # glob finds nothing in a folder that it cannot read
        found = []
        for name in names:
            path, copied = folder / name, any(fnmatch(name, pattern) for pattern in COPIED)
            if (copied or name in READ) and path.is_file() and path.suffix != ".safetensors":
                if not inside(folder, path):
                    raise ExportError(
                        f"{path} is a link out of the folder, and its text would be in the export: put the file itself "
                        "there, or take the link away"
                    )
                require_same(path, path.stat(), files)
                found += [path] if copied else []
    except OSError as error:
        raise ExportError(f"{folder} cannot be read: {reason(error)}") from None
    return found
