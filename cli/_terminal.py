"""Everything about prompt_toolkit: messages typed at a terminal, with history, completion and a status line.

What is typed while an answer comes waits for the next message."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from ..foreign import shown
from ._print import command
from ._typed import MORE, SIGN, goes_on, is_block, message_of

MOST = 2**20  # bytes of history that are kept
PASTES, PASTES_NO_MORE = "\x1b[?2004h", "\x1b[?2004l"  # tells a terminal to mark what is pasted
STYLE = Style.from_dict({"bottom-toolbar": "noreverse dim"})
Words = Callable[[str, str], Iterable[str] | None]  # command, what follows it -> what it may be; None: a file's name


class Complete(Completer):
    """Commands, and what may follow them."""

    def __init__(self, commands: Iterable[str], words: Words) -> None:
        self._commands, self._words, self._files = tuple(commands), words, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text.partition(" ")
        if not space:
            found = [each for each in self._commands if each.startswith(text.lower())]
            yield from (Completion(each, -len(text), each.rstrip()) for each in found)
            return
        words = self._words(name.lower(), rest)
        if words is None:
            for file in self._files.get_completions(Document(rest, len(rest)), complete_event):
                yield Completion(file.text, file.start_position, shown(file.display_text))
            return
        last = rest.rpartition(" ")[2]
        yield from (Completion(word, -len(last), word.rstrip()) for word in words if word.startswith(last))


class _Output(Vt100_Output):
    """The terminal is not asked where its cursor is: the reply would come between what is typed. The status line goes
    below what is typed, wherever that is."""

    @property
    def responds_to_cpr(self) -> bool:
        return False

    def get_rows_below_cursor_position(self) -> int:
        return 1


class Terminal:
    """Asks for messages at a terminal that can draw."""

    terminal = True

    def __init__(self, commands: Iterable[str], words: Words, history: Path) -> None:
        """`history`: the file that keeps what was typed, for its owner alone."""
        self._status, self._pasted = "", False
        self._session: PromptSession[str] = PromptSession(
            SIGN,
            output=_Output.from_pty(sys.stdout, term=os.environ.get("TERM")),
            history=_history(history),
            completer=Complete(commands, words),
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=self._keys(),
            prompt_continuation=lambda width, line, is_wrapped: "" if is_wrapped else MORE,
            bottom_toolbar=self._toolbar,
            enable_suspend=True,
            style=STYLE,
        )

    def ask(self, status: Callable[[], str]) -> str:
        """The next message; "" for an empty one; `status`: the line below it. Raises EOFError for Ctrl-D,
        KeyboardInterrupt for Ctrl-C."""
        self._pasted, self._status = False, status()
        try:
            text = self._session.prompt().encode("utf-8", "replace").decode("utf-8")
        finally:
            command(PASTES)  # while an answer comes, too: what is pasted then is the next message
        if self._pasted and "\n" in text:  # as it is: no command, no block
            return " " + text.strip("\n")
        return message_of(text)

    def close(self) -> None:
        command(PASTES_NO_MORE)

    def _toolbar(self) -> StyleAndTextTuples:
        return [("", shown(self._status)[: self._session.output.get_size().columns - 1])]

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
        def enter(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            buffer.cursor_position = len(buffer.text)
            if (self._pasted and "\n" in buffer.text) or not goes_on(buffer.text):
                buffer.validate_and_handle()
                return
            if not is_block(buffer.text) and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
            buffer.insert_text("\n")

        @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
        def another_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.BracketedPaste, filter=has_focus(DEFAULT_BUFFER))
        def paste(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
            self._pasted = self._pasted or "\n" in text
            event.current_buffer.insert_text(text)

        return keys


def _history(path: Path) -> History:
    """What was typed in earlier chats, in a file that its owner alone can read; in memory where none can be written."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        if path.stat().st_size > MOST:
            half = path.read_bytes()[-MOST // 2 :]
            path.write_bytes(half[half.find(b"\n# ") + 1 :])
        return FileHistory(path)
    return InMemoryHistory()
