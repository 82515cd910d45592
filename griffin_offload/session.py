"""A chat in one file: its messages and settings, and what its next turn needs so that no prompt is computed again.

The weights are not in it: the first turn after a session was resumed reads them once, as it passes its own tokens
through the full model. A session belongs to one checkpoint, by `checkpoint_key`, and one dtype."""

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from .chat import Chat, Conversation
from .checkpoint.identity import Identity
from .checkpoint.key import checkpoint_key
from .checkpoint.one_file import read_facts, reading, write_file
from .engine import Engine
from .errors import GriffinError, OptionError, one_line
from .files import reason
from .offload.saved_turns import pack, unpack
from .options import Decoding, Pruning, as_dict, build, declared
from .paths import state_folder
from .small_json import as_kind, need
from .version import __version__

FORMAT, VERSION = "griffin-session", 1
NAME = re.compile(r"[\w][\w.-]{0,99}")


@dataclass(frozen=True)
class Session:
    """What a session's file says without its tensors. `tokens`: whose keys and values it has; 0: none. `identity`: of
    the file, so that it is known when another chat has saved over it."""

    name: str
    path: Path
    facts: dict[str, Any]
    identity: Identity

    @property
    def model(self) -> str:
        return str(self.facts["model"])

    @property
    def dtype(self) -> str:
        return str(self.facts["dtype"])

    @property
    def tokens(self) -> int:
        return int(self.facts["tokens"])

    @property
    def messages(self) -> int:
        return len(self.facts["conversation"]["messages"])

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def saved(self) -> float:
        """When it was saved: seconds since 1970."""
        return self.path.stat().st_mtime

    def options(self, group: type[Any], **given: Any) -> Any:
        """Pruning or Decoding as the session had them, but for what is `given`. Raises OptionError."""
        stored = self.facts["pruning" if group is Pruning else "decoding"]
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        try:
            for name, told, _ in declared(group):
                if name not in given and not told.takes(values.get(name)):
                    raise OptionError(f"{name} cannot be {values[name]!r}")
            return build(group, {**values, **given})
        except (TypeError, ValueError, ArithmeticError) as error:
            raise OptionError(f"the options of the session {self.name} are damaged: {one_line(error)}") from None

    def resume(self, engine: Engine, pruning: Pruning, decoding: Decoding) -> Chat:
        """The chat as it was. Raises GriffinError for the session of another model, and for a damaged file; nothing of
        the engine has changed then."""
        self.check(engine)
        chat = Chat(engine, pruning, decoding)
        try:
            chat.conversation = Conversation.from_json(self.facts["conversation"])
            if self.tokens:
                room = need(self.facts["turns"], "room", int)
                if not 0 < room <= engine.context_length:
                    raise ValueError(f"a cache for {room} tokens, of a context of {engine.context_length}")
                with reading(self.path) as read:
                    names = set(self.facts["tensors"])
                    shape = [len(layer.blocks) for layer in engine.skeleton.layers]
                    unpack(engine.resident, engine.opened.cache_for, read, names, self.facts["turns"], shape)
                    engine.resident.turns.pruning = self.options(Pruning)
        except Exception as error:  # what the numbers of a file can make the model's cache raise
            engine.resident.turns.clear()
            told = str(error) if isinstance(error, GriffinError) else f"it is damaged ({one_line(error)})"
            raise GriffinError(f"the session {self.name} cannot be resumed: {told}") from error
        return chat

    def check(self, engine: Engine) -> None:
        """Raises GriffinError where the engine's model is not the session's."""
        if self.facts["key"] not in ("", checkpoint_key(engine.checkpoint)):
            raise GriffinError(
                f"the session {self.name} is of {self.model}, and {engine.name} is another model, or another version "
                "of it: start a new chat"
            )
        if self.dtype != engine.dtype:
            raise GriffinError(f"the session {self.name} ran in {self.dtype}: give --dtype {self.dtype}")


def save_session(chat: Chat, name: str, *, cache: bool = True) -> Session:
    """Saves a chat: whole or not at all, for its owner alone. `cache` False: its messages and options alone, at once;
    so too where the model's files have changed or are gone. Raises GriffinError."""
    if not len(chat.conversation):
        raise GriffinError("there is nothing to save yet: the conversation has no message")
    path, engine = session_path(name), chat.engine
    try:
        key = checkpoint_key(engine.checkpoint)
    except (OSError, GriffinError):
        key, cache = "", False
    tensors, turns = (pack(engine.resident) if cache else None) or ({}, {})
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "griffin": __version__,
        "model": engine.name if not Path(engine.name).exists() else str(Path(engine.name).absolute()),
        "key": key,
        "dtype": engine.dtype,
        "conversation": chat.conversation.to_json(),
        "pruning": as_dict(chat.pruning),
        "decoding": as_dict(chat.decoding),
        "tokens": len(tensors["token_ids"]) if tensors else 0,
        "tensors": list(tensors),
        "turns": turns,
    }
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, tensors, facts)
        identity = Identity.of(path.stat())
    except (OSError, TypeError, ValueError) as error:
        raise GriffinError(f"cannot save the session {name} as {path}: {reason(error)}") from error
    return Session(name, path, facts, identity)


def free_name(name: str, seen: Identity | None) -> str:
    """The name, if no session has it, or the file as it was `seen`; else one with a number that is free. Raises
    OptionError for a name that is none."""
    try:
        if Identity.of(session_path(name).stat()) == seen:
            return name
    except OSError:
        return name
    numbered = (f"{name}-{number}" for number in count(2))
    return next(each for each in numbered if not session_path(each).exists())


def open_session(name: str | None) -> Session:
    """A saved session; None: the one that was saved last. Raises GriffinError for none, a damaged one, or one of
    another version of Griffin."""
    if name is None:
        names = session_names()
        if not names:
            raise GriffinError("no session is saved: griffin chat --session NAME saves one")
        name = names[0]
    path = session_path(name)
    if not path.exists():
        known = ", ".join(session_names()[:8]) or "none"
        raise GriffinError(f"there is no session {name}; there are: {known}")
    try:
        identity = Identity.of(path.stat())
        facts = read_facts(path)
    except (OSError, GriffinError) as error:
        raise GriffinError(f"the session {name} cannot be read: {error}") from error
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise GriffinError(
            f"the session {name} was saved by another version of Griffin (format {facts.get('version')!r}; this one "
            f"reads {VERSION}): start a new chat, or use that version"
        )
    try:
        _check(facts)
    except ValueError as error:
        raise GriffinError(f"the session {name} cannot be read: it is damaged ({one_line(error)})") from None
    return Session(name, path, facts, identity)


def _check(facts: dict[str, Any]) -> None:
    """Raises ValueError where a field is missing, or of another kind."""
    for field in ("model", "key", "dtype"):
        need(facts, field, str)
    for field in ("conversation", "pruning", "decoding", "turns"):
        need(facts, field, dict)
    if not 0 <= need(facts, "tokens", int) < 2**40:
        raise ValueError("its tokens are no number of tokens")
    for tensor in need(facts, "tensors", list):
        as_kind(tensor, str, "the name of a tensor")
    Conversation.from_json(facts["conversation"])


def delete_session(name: str) -> None:
    """Raises GriffinError where there is none."""
    path = session_path(name)
    if not path.exists():
        raise GriffinError(f"there is no session {name}; `griffin sessions` lists them")
    path.unlink()


def session_names() -> list[str]:
    """The saved sessions, the newest first."""
    found = []
    for path in sessions_folder().glob("*.safetensors"):
        with suppress(OSError):  # deleted meanwhile, or a link to nothing
            found.append((path.stat().st_mtime, path.stem))
    return [name for _, name in sorted(found, reverse=True) if NAME.fullmatch(name)]


def session_path(name: str) -> Path:
    """Raises OptionError for a name that could leave the folder."""
    if not NAME.fullmatch(name):
        raise OptionError(f"{name!r} names no session: use letters, digits, dots, - and _, and begin with a letter")
    return sessions_folder() / f"{name}.safetensors"


def sessions_folder() -> Path:
    return state_folder() / "sessions"
