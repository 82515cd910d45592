"""Prompts and answers that are no local file of rows: folders, Parquet, and whatever pyarrow finds by its address.

An address is a path, or SCHEME://...: s3, gs, hdfs, file, as Ray reads and writes them. Credentials are pyarrow's: of
the environment, or of the machine."""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import GriffinError, OptionError, one_line
from ..inputs import ROWS
from ..paths import state_folder
from ..units import format_bytes

ENDS = (".jsonl", ".json", ".parquet")
FIELDS = ("id", "prompt", "messages", "system")  # other columns of Parquet may be no JSON: dates, bytes


def is_elsewhere(address: str) -> bool:
    return "://" in address or address.endswith(".parquet") or Path(address).is_dir()


def refuse_inside(output: Path, source: str) -> None:
    """Raises GriffinError where a file of answers would be read as one of prompts when the run goes on."""
    where = Path(source)
    if where.is_dir() and output.name.endswith(ENDS) and output.absolute().parent.resolve() == where.resolve():
        raise GriffinError(f"{output} would be one of the files of prompts in {source}: write it to another folder")


def read_elsewhere(address: str) -> bytes:
    """As the content of one JSONL file: the rows of a Parquet or JSONL file, or of all such in a folder, ordered by
    name. A field of Parquet without a value is left out. Raises GriffinError."""
    with _reasons(f"cannot read {address}"):
        from pyarrow import fs

        system, path = _found(address)
        names = [path]
        if system.get_file_info(path).type == fs.FileType.Directory:
            inside = system.get_file_info(fs.FileSelector(path))
            names = sorted(each.path for each in inside if each.is_file and each.path.endswith(ENDS))
        if not names:
            raise GriffinError(f"{address} holds no {', '.join(ENDS)}")
        content = b""
        for name in names:
            content += _rows(system, name, ROWS - len(content))
        return content


def _rows(system: Any, name: str, most: int) -> bytes:
    """The rows of one file, the last with its newline. Raises GriffinError for more than `most` bytes."""
    if name.endswith(".parquet"):
        content = _parquet_rows(system, name, most)
    else:
        with system.open_input_stream(name) as file:
            content = file.read(most + 1).removeprefix(codecs.BOM_UTF8)
        content += b"" if content.endswith(b"\n") else b"\n"
    if len(content) > most:
        raise GriffinError(f"{name}: with it there are more rows than {format_bytes(ROWS)}, the most that is read here")
    return content


def _parquet_rows(system: Any, name: str, most: int) -> bytes:
    """As JSONL; more than `most` bytes where there are more: a small file can hold very many."""
    from pyarrow.parquet import ParquetFile

    lines, size = [], 0
    with system.open_input_file(name) as file:
        table = ParquetFile(file)
        given = table.schema_arrow.names
        columns = [each for each in given if each in FIELDS]
        if not {"prompt", "messages"} & set(columns):
            raise GriffinError(f"{name} has no column prompt or messages; it has {', '.join(given)}")
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                known = {field: value for field, value in row.items() if value is not None}
                lines.append(json.dumps(known, ensure_ascii=False).encode("utf-8") + b"\n")
                size += len(lines[-1])
            if size > most:
                break
    return b"".join(lines)


@contextmanager
def written_elsewhere(address: str) -> Iterator[Path]:
    """A file of this machine for results that go to an address: copied there at the end of a block that finishes them,
    whether it raises or not. Until then the file is what a stopped run continues. Raises GriffinError."""
    with _reasons(f"cannot write to {address}"):
        system, path = _found(address)
    folder = state_folder() / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / f"{sha256(address.encode()).hexdigest()[:16]}.jsonl"
    try:
        yield local
    finally:
        if local.exists() and not local.with_name(local.name + ".state").exists():
            told = f"cannot write to {address}; the answers are in {local}"
            with _reasons(told), system.open_output_stream(path) as out:
                out.write(local.read_bytes())


def _found(address: str) -> tuple[Any, str]:
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(address if "://" in address else str(Path(address).absolute()))
    return system, path


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Errors of pyarrow, and that it is not there, in one line."""
    if find_spec("pyarrow") is None:
        raise OptionError(f"{what}: that needs pyarrow: pip install 'griffin-offload[ray]'")
    try:
        yield
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise GriffinError(f"{what}: {one_line(error)}") from error
