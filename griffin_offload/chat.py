"""A conversation with a model: its turns, its saved file, and the options that may change between two answers.

Each answer has the whole conversation as its prompt, of which the engine computes what is new. A model with a chat
template is asked through it. A base model, which has none, continues a plain transcript, "User: ...\\nAssistant:", and
its answer ends where the user would speak.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GriffinError, OptionError
from .files import reason, write_whole
from .inputs import TEXT, read_input
from .options import Decoding, OnLayer, OnText, Pruning, as_dict, with_text
from .small_json import is_text

if TYPE_CHECKING:
    from .engine import Engine
    from .run import Answer

FORMAT = "griffin-conversation"
STOP = "\nUser:"


class Conversation:
    """Exchanges of one user and one assistant message, below a system text that may be None."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """A fresh list of {"role", "content"}, the system text first: what a chat template takes."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [dict(turn) for turn in self._turns]

    @property
    def last_user(self) -> str | None:
        """The newest user message."""
        return next((turn["content"] for turn in reversed(self._turns) if turn["role"] == "user"), None)

    def __len__(self) -> int:
        """Messages, the system text not counted."""
        return len(self._turns)

    def add_user(self, text: str) -> None:
        assert not self._turns or self._turns[-1]["role"] == "assistant", "the last question has no answer yet"
        self._turns.append({"role": "user", "content": text})

    def add_assistant(self, text: str) -> None:
        assert self._turns, "an answer needs a question"
        assert self._turns[-1]["role"] == "user", "the last question has its answer"
        self._turns.append({"role": "assistant", "content": text})

    def drop_answer(self) -> str | None:
        """Remove the newest answer, if the conversation ends with one, and return it."""
        if self._turns and self._turns[-1]["role"] == "assistant":
            return self._turns.pop()["content"]
        return None

    def asking(self, question: str, *, again: bool = False) -> "Conversation":
        """Another conversation that ends with a question; `again`: the last one of this."""
        other = Conversation(self.system)
        other._turns = self._turns[: -2 if again else None]
        other.add_user(question)
        return other

    def take(self, other: "Conversation") -> None:
        """Its messages become another's, in one step."""
        self._turns = other._turns

    def undo(self) -> str | None:
        """Remove the newest exchange, answered or not. Returns its user message; None if there is nothing."""
        self.drop_answer()
        return self._turns.pop()["content"] if self._turns else None

    def clear(self) -> None:
        """Forget the messages; the system text stays."""
        self._turns.clear()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": 1, "system": self.system, "messages": [dict(turn) for turn in self._turns]}

    def to_markdown(self) -> str:
        """The conversation as a text to read, each message below who said it."""
        names = {"system": "System", "user": "User", "assistant": "Assistant"}
        return "\n".join(f"## {names[turn['role']]}\n\n{turn['content'].strip()}\n" for turn in self.messages)

    def save(self, path: Path) -> None:
        """Write as JSON: whole or not at all. Replaces only another saved conversation. Raises GriffinError."""
        try:
            if os.path.lexists(path):
                self._check_ours(path)
            with write_whole(path, sync=True, make_folder=False) as temporary:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(self.to_json(), file, ensure_ascii=False, indent=1)
                    file.write("\n")
        except (OSError, ValueError) as error:
            raise GriffinError(f"cannot save the conversation as {path}: {reason(error)}") from error

    @staticmethod
    def _check_ours(path: Path) -> None:
        try:
            Conversation.load(path)
        except GriffinError:
            raise GriffinError(f"{path} exists and is not a saved conversation: choose another name") from None

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read what `save` wrote, checking every field. Raises GriffinError."""
        try:
            content = json.loads(read_input(path, TEXT).decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise GriffinError(f"cannot load a conversation from {path}: {reason(error)}") from error

        try:
            return cls.from_json(content)
        except ValueError as error:
            raise GriffinError(f"{path} is not a saved conversation: {error}") from None

    @classmethod
    def from_json(cls, content: Any) -> "Conversation":
        """What `to_json` gave, every field checked. Raises ValueError."""

        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        need(isinstance(content, dict) and content.get("format") == FORMAT, f'no "format": "{FORMAT}"')
        need(content.get("version") == 1, f"version {content.get('version')!r}; this Griffin reads version 1")
        need(content.get("system") is None or is_text(content["system"]), "the system text is not text")
        turns = content.get("messages")
        need(isinstance(turns, list), "no list of messages")
        need(len(turns) % 2 == 0, f"{len(turns)} messages: the last question has no answer")
        result = cls(content.get("system"))
        for index, turn in enumerate(turns):
            role = ("user", "assistant")[index % 2]
            ok = isinstance(turn, dict) and turn.get("role") == role and is_text(turn.get("content"))
            need(ok, f"message {index + 1} should have the role {role!r} and a text as its content")
            result._turns.append({"role": role, "content": turn["content"]})
        return result


def transcript(messages: list[dict[str, str]]) -> str:
    """A conversation as plain text that a base model continues with the next answer."""
    names = {"user": "User: ", "assistant": "Assistant: "}
    parts = [names.get(message["role"], "") + message["content"] for message in messages]
    if messages and messages[0]["role"] == "system":
        parts[0] += "\n"
    return "\n".join([*parts, "Assistant:"])


def _without_leading_blanks(on_text: OnText) -> OnText:
    """Passes text on from its first character that is no white space."""
    begun = False

    def pass_on(piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if piece:
            on_text(piece)

    return pass_on


class Chat:
    """An engine, one conversation with it, and the options that its answers are made with."""

    def __init__(
        self,
        engine: "Engine",
        pruning: Pruning | None = None,
        decoding: Decoding | None = None,
        system: str | None = None,
    ) -> None:
        self.engine = engine
        self.pruning, self.decoding = pruning or Pruning(), decoding or Decoding()
        self.conversation = Conversation(system)
        self.prompt_end = ""  # how the last prompt ended, before its answer: a template may begin to think there

    @property
    def used_tokens(self) -> int:
        """Tokens of context that the conversation takes so far; 0 where it has no message."""
        if not len(self.conversation):
            return 0
        try:
            return len(self.prompt_ids())
        except GriffinError:  # a template that takes no such conversation says so when it is asked
            return 0

    def settings(self) -> dict[str, Any]:
        """Every option that `set` changes: name -> value."""
        return {**as_dict(self.pruning), **as_dict(self.decoding)}

    def setting(self, name: str) -> str:
        """The name of an option, from it or from a beginning that no other has. Raises OptionError."""
        known, name = self.settings(), name.replace("-", "_")
        found = [name] if name in known else [each for each in known if each.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise OptionError(f"{name} may be {', '.join(found)}")
        raise OptionError(f"no setting is called {name!r}: there are {', '.join(known)}")

    def set(self, name: str, text: str) -> None:
        """Change one option, its value read from text; 'none' gives its default.

        Raises OptionError, and then nothing has changed."""
        name = self.setting(name)
        pruning, decoding = self.pruning, self.decoding
        if name in as_dict(pruning):
            pruning = with_text(pruning, name, text)
        else:
            decoding = with_text(decoding, name, text)
        decoding.generate_options(pruning.selection)  # refuses greedy beside sampling
        self.pruning, self.decoding = pruning, decoding

    def prompt_ids(self, conversation: Conversation | None = None) -> list[int]:
        """Token ids of the whole conversation (by default the chat's), up to where the next answer begins."""
        messages = (conversation or self.conversation).messages
        if self.engine.has_chat_template:
            return self.engine.encode_chat(messages)
        return self.engine.encode(transcript(messages), raw=True)

    def ask(self, text: str, *, on_text: OnText | None = None, on_layer: OnLayer | None = None) -> "Answer":
        """Answer one more user message. If that fails, or is interrupted before the first token, the conversation is as
        it was.

        An answer that is interrupted later is kept as far as it got (finish_reason "interrupted")."""
        return self._answer(text, False, on_text, on_layer)

    def regenerate(self, *, on_text: OnText | None = None, on_layer: OnLayer | None = None) -> "Answer":
        """Answer the last user message again. If that fails, the old answer stays. Raises GriffinError."""
        question = self.conversation.last_user
        if question is None or self.conversation.messages[-1]["role"] != "assistant":
            raise GriffinError("there is no answer yet to replace")
        return self._answer(question, True, on_text, on_layer)

    def _answer(self, question: str, again: bool, on_text: OnText | None, on_layer: OnLayer | None) -> "Answer":
        """Whenever this is stopped, the conversation has the whole exchange or nothing of it."""
        asked = self.conversation.asking(question, again=again)
        ids, options = self.prompt_ids(asked), (self.pruning, self.decoding)
        self.prompt_end = str(self.engine.tokenizer.decode(ids[-16:]))
        if self.engine.has_chat_template:
            answer = self.engine.generate(ids, *options, on_text=on_text, on_layer=on_layer, continues=True)
            asked.add_assistant(answer.reply or answer.text)
            self.conversation.take(asked)
            return answer
        decoding = replace(self.decoding, stop=(*self.decoding.stop, STOP))
        on_text = _without_leading_blanks(on_text) if on_text else None
        more: dict[str, Any] = {"on_text": on_text, "on_layer": on_layer}
        answer = self.engine.generate(ids, self.pruning, decoding, continues=True, **more)
        asked.add_assistant(answer.text.strip())
        self.conversation.take(asked)
        return answer
