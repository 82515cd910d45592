"""Files with one JSON object a line: reads rows with checks, and writes results that a stopped run continues.

A results file has only rows. Their settings are in a small file beside it, `NAME.state`, until the run is finished.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import GriffinError
from .files import check_same, reason, write_text, write_whole
from .inputs import ROWS, read_input

Row = dict[str, Any]
Fault = Callable[[Row], str | None]  # row -> what is wrong with it


def read_content(path: Path | str) -> bytes:
    """The bytes of a file of rows, or of a pipe, which can be read once. Raises GriffinError."""
    try:
        return read_input(path, ROWS, pipe=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise GriffinError(f"cannot read {path}: {reason(error)}") from error


def read_rows(
    path: Path | str, fault: Fault | None = None, keys: Sequence[str] = ("id",), *, content: bytes | None = None
) -> list[Row]:
    """The rows of a file, without blank lines. Raises GriffinError that names file and line.

    A row without an "id" (a text or a whole number) gets the number of its line. `keys`: fields whose values together
    must differ in all rows. `content`: what `read_content` gave, where it is needed beside the rows."""
    content = read_content(path) if content is None else content
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parse(line, where)
        row.setdefault("id", number)
        if not isinstance(row["id"], str | int) or isinstance(row["id"], bool):
            raise GriffinError(f'{where}: the "id" is neither a text nor a whole number')
        if fault and (wrong := fault(row)):
            raise GriffinError(f"{where}: {wrong}")
        first = seen.setdefault(_key(row, keys), number)
        if first != number:
            raise GriffinError(f"{where}: the id {row['id']!r} is line {first}'s too: give every row its own")
        rows.append(row)
    if not rows:
        raise GriffinError(f"{path} has no rows: give it one JSON object a line")
    return rows


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # "\ud800" is JSON, but no tokenizer takes it
    except UnicodeDecodeError as error:
        raise GriffinError(f"{where}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except UnicodeEncodeError:
        raise GriffinError(f"{where}: an escape \\uD800 to \\uDFFF stands alone, which is half a character") from None
    except json.JSONDecodeError as error:
        raise GriffinError(f"{where}: not JSON ({error.msg.lower()}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise GriffinError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(row, dict):
        raise GriffinError(f"{where}: not a JSON object: write {{...}} on each line")
    return row


def begun_with(path: Path, memory: Path) -> dict[str, Any]:
    """The settings of the run that wrote a file and was stopped, or has finished it; {} where neither is known."""
    if path.exists():
        for state in (_state_of(path), _remembered_in(memory, path)):
            with suppress(OSError, ValueError, RecursionError):
                settings = json.loads(state.read_text("utf-8"))
                return settings if isinstance(settings, dict) else {}
    return {}


def _state_of(path: Path) -> Path:
    return path.with_name(path.name + ".state")


def _remembered_in(memory: Path, path: Path) -> Path:
    return memory / f"{_hash(os.fsencode(os.path.realpath(path)))}.json"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _key(row: Row, keys: Sequence[str]) -> str:
    return json.dumps([row[key] for key in keys])  # 1 and "1" differ


class Results:
    """A file that rows are added to. Each is on the disk before `add` returns, so that a stop loses none.

    `settings` (JSON types), and the `content` of the file `source`, are what the rows depend on. Opened again with the
    same, a file continues: `rows` has its rows, `has` finds one by `keys`, and half a line at the end is cut off. A
    file with other settings, or of a finished run, is refused, or with `force` begun again. A context manager: a block
    without an exception finishes the run; one that fails before its first row leaves no file.

    `content`: what was read of `source`, which need be no file then; None reads it now. `memory`: a folder that
    remembers finished runs. Opened again with the same settings, such a run is `finished`: all its rows are there."""

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        source: Path | str,
        content: bytes | None = None,
        keys: Sequence[str] = ("id",),
        force: bool = False,
        memory: Path | None = None,
    ) -> None:
        """Raises GriffinError for a file that must not be written, or cannot be."""
        self.finished = self._begun = False
        self.rows: list[Row] = []
        self._remembered = memory and _remembered_in(memory, path)
        self.path, self._keys = path, keys
        self._state = _state_of(path)
        if path.exists() and not path.is_file():
            raise GriffinError(f"{path} is not a plain file: results are written to one")
        for ours in (path, self._state):
            if ours.exists() and os.path.exists(source) and ours.samefile(source):
                raise GriffinError(f"{ours} is the input too: write the results to another file")
        content = read_content(source) if content is None else content
        self._settings = {**settings, "input": _hash(content)}
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise GriffinError(f"cannot write to {path}: {reason(error)}") from error
        try:
            self._lock()
            self.rows = self._begin(self._settings, force)
        except BaseException as error:
            self._leave(error)
            raise
        self._done = {_key(row, keys) for row in self.rows}

    def has(self, row: Row) -> bool:
        """Whether there is a row with the same keys."""
        return _key(row, self._keys) in self._done

    def add(self, row: Row) -> None:
        """Writes a row. Raises GriffinError."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        with self._writing("the same command goes on later"):
            self._check()
            if self._file.write(line) < len(line):
                raise OSError("no space left")
            os.fsync(self._file.fileno())
        self._size += len(line)
        self.rows.append(row)
        self._done.add(_key(row, self._keys))

    def sort(self, ids: Iterable[Any]) -> None:
        """Puts the rows of a whole run in this order of their ids, where they are in another. Raises GriffinError."""
        by_id = {json.dumps(row["id"]): row for row in self.rows}
        order = [by_id[json.dumps(each)] for each in ids]
        if order == self.rows:
            return
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in order)
        with self._writing("its rows are there, in the order in which they were done"):
            self._check()
            write_text(self.path, "".join(lines), sync=True)
            self._file.close()
            self._file = self.path.open("a+b", buffering=0)
            self._size = os.fstat(self._file.fileno()).st_size
        self._lock()
        self.rows = order

    def __enter__(self) -> "Results":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.finished:
                with self._writing("the rows may be lost"):
                    self._check()
                    if self._remember():
                        self._state.unlink(missing_ok=True)
        finally:
            self._leave(error)

    @contextmanager
    def _writing(self, way_out: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GriffinError(f"cannot write to {self.path}: {reason(error)}; {way_out}") from error

    def _check(self) -> None:
        """Raises OSError where the file is not the one, or not as long, as this run left it."""
        check_same(self._file.fileno(), self.path)
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise OSError("another program has changed it")

    def _leave(self, error: BaseException | None) -> None:
        """Closes the file; where a run fails before its first row, removes it. No state stays without its file."""
        with suppress(OSError):
            if not self.path.exists():
                self._state.unlink(missing_ok=True)
            elif isinstance(error, Exception) and self._begun and not self.rows:
                check_same(self._file.fileno(), self.path)
                self._state.unlink(missing_ok=True)
                self.path.unlink()
        self._file.close()

    def _lock(self) -> None:
        """Locks the file until the process ends. Raises GriffinError if another run has it."""
        busy = GriffinError(f"{self.path} is being written by another run: wait for it, or end it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a file system without locks
            pass
        try:
            check_same(self._file.fileno(), self.path)
        except OSError:  # a run that failed has just removed it
            raise busy from None

    def _begin(self, settings: dict[str, Any], force: bool) -> list[Row]:
        """The rows of an earlier run, or none in an emptied file."""
        self._size = self._file.seek(0, os.SEEK_END)
        if self._size and not force:
            if self._was_finished():
                self.finished = True
            else:
                self._check_settings(settings)
            return self._read()
        self._begun = not self._size
        with self._writing("nothing was written"), write_whole(self._state) as temporary:
            temporary.write_text(json.dumps(settings), "utf-8")
            with temporary.open("rb") as file:  # to the disk before any row: rows without a state belong to no run
                os.fsync(file.fileno())
            self._state.unlink(missing_ok=True)  # never beside rows of other settings
            self._begun = True
            self._file.truncate(0)
        self._size = 0
        return []

    def _remember(self) -> bool:
        """Whether the state is needed no more: it also tells that all rows are there, where nothing else does."""
        if self._remembered:
            try:
                write_text(self._remembered, json.dumps(self._as_finished()))
            except OSError:
                return False
        return True

    def _as_finished(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(self._settings)), "output": _hash(self.path.read_bytes())}

    def _was_finished(self) -> bool:
        """Whether a run with these settings has written the file as it is, to its end."""
        if self._remembered is None or self._state.exists():
            return False
        with suppress(OSError, ValueError, RecursionError):
            return bool(json.loads(self._remembered.read_text("utf-8")) == self._as_finished())
        return False

    def _check_settings(self, settings: dict[str, Any]) -> None:
        try:
            state = json.loads(self._state.read_text("utf-8"))
        except FileNotFoundError:
            raise GriffinError(f"{self.path} exists: choose another name, or --force to replace it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise GriffinError(f"{self._state} cannot be read ({reason(error)}); --force starts again") from None
        before = state if isinstance(state, dict) else {}
        for name, value in json.loads(json.dumps(settings)).items():
            if before.get(name) != value:
                raise GriffinError(
                    f"{self.path} was begun with {name} {json.dumps(before.get(name))}, and this run has "
                    f"{json.dumps(value)}: choose another name, or --force to start again"
                )

    def _read(self) -> list[Row]:
        """The whole rows; cuts off half a row after the last newline, which a stopped run left."""
        with self._writing("the same command goes on later"):
            self._file.seek(0)
            whole, newline, half = self._file.readall().rpartition(b"\n")
            self._size = len(whole) + len(newline)
            if half:
                self._file.truncate(self._size)
        rows = []
        for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
            where = f"{self.path}, line {number}"
            row = _parse(line, where)
            if missing := [key for key in self._keys if key not in row]:
                raise GriffinError(f"{where}: no {missing[0]!r}: this is no row of the run; --force starts again")
            rows.append(row)
        return rows
