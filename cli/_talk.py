"""One chat at a terminal or through pipes: its answers on the screen, and what is told of each."""

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..chat import Chat
from ..errors import ContextError
from ..options import as_dict
from ..units import format_bytes
from . import _console as console
from ._answer_screen import AnswerScreen
from ._print import echo
from ._report import choice_note, remember
from ._text import ending
from ._thinking import Parting, open_mark

if TYPE_CHECKING:
    from ..checkpoint.identity import Identity
    from ..run import Answer

OFFERS = "/undo takes back the last turn, /clear forgets the conversation"
SHORTER = ", /set max_new_tokens N makes answers shorter"


class Talk:
    """`plain`: answers are shown as the model writes them, not as Markdown. `terminal`: a person types."""

    def __init__(self, chat: Chat, *, terminal: bool, plain: bool = False) -> None:
        self.chat, self.terminal = chat, terminal
        self.markdown, self.shows_thinking = not plain, True
        self.last: Answer | None = None
        self.leaving = False
        self.read = ""  # a text that goes before the next message
        self.failed: str | None = None  # the last message, until it is answered
        self.asking = False  # whether what was typed last has asked the model
        self.worked = chat.pruning, chat.decoding  # of the last answer, or of the beginning
        self.session: str | None = None  # under which the chat is saved when it ends
        self.seen: Identity | None = None  # the session's file, as this chat has read or written it

    def send(self, text: str) -> None:
        """Asks a message, and shows the answer. Raises what the engine raises; the conversation is as before then."""
        self.failed, question = text, "\n\n".join(part for part in (self.read, text) if part)
        try:
            answered = self.answer(lambda **callbacks: self.chat.ask(question, **callbacks))
        except ContextError as error:
            raise ContextError(f"{error}{f': {OFFERS}' if len(self.chat.conversation) else ''}") from error
        if answered:
            self.failed, self.read = None, ""

    def retry(self) -> None:
        """Asks the message again that got no answer, or the last one that got one."""
        if self.failed is None:
            self.answer(self.chat.regenerate)
        else:
            self.send(self.failed)

    def take_back(self) -> None:
        """After an error in a turn: options that have changed since the last answer are as they were at that."""
        before, now = (
            {**as_dict(pruning), **as_dict(decoding)}
            for pruning, decoding in (self.worked, (self.chat.pruning, self.chat.decoding))
        )
        self.chat.pruning, self.chat.decoding = self.worked
        if changed := [f"{name} {shown_value(before[name])}" for name in before if before[name] != now[name]]:
            console.note(f"set back, as at the last answer: {', '.join(changed)}")

    def answer(self, ask: Callable[..., "Answer"]) -> bool:
        """Shows the answer that `ask(on_text, on_layer)` makes, and what it took. False: Ctrl-C came before it."""
        self.asking = True
        show = Shown(self)
        try:
            with console.layer_progress() as on_layer:
                answer = ask(on_text=show, on_layer=on_layer)
        except KeyboardInterrupt:  # before the first token: later, the engine ends the answer
            show.close()
            console.note("stopped before the first token: the question is taken back")
            return False
        except BaseException:
            show.close()
            raise
        self.worked = self.chat.pruning, self.chat.decoding
        show.close(ended=True)
        self._tell(answer)
        return True

    def _tell(self, answer: "Answer") -> None:
        report = answer.report
        if self.last is None and (note := choice_note(self.chat.pruning, report.plan, report.dtype)):
            console.note(note)
        self.last = answer
        console.note(footer(answer, self.chat))
        if report.warning:
            console.note(as_settings(report.warning))
        if note := context_note(self.chat):
            console.note(note)
        remember(report)

    def status(self) -> str:
        """Model, what is kept of it, fidelity, memory, speed and context, in a line; the most important first."""
        engine = self.chat.engine
        parts = [engine.name.rstrip("/").rpartition("/")[2]]
        used = f"{self.chat.used_tokens:,} of {engine.context_length:,} tokens"
        if self.last is None:
            return " · ".join([*parts, used, f"budget {format_bytes(engine.budget)}"])
        report = self.last.report
        plan, speed = report.plan, report.decode_tokens_per_s
        kept = sum(layer.kept for layer in plan.layers) / max(1, sum(layer.neurons for layer in plan.layers))
        parts += [used]
        parts += [f"{speed:.1f} tokens/s"] if speed else []
        parts += [f"{format_bytes(plan.resident_bytes)} resident", f"{kept:.0%} of the neurons kept"]
        if report.fidelity and not report.fidelity.why_not:
            parts += [f"fidelity {report.fidelity.kept:.2f}"]
        return " · ".join(parts)


class Shown:
    """An answer's text as it comes: on a terminal that can draw rendered, elsewhere as it is."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._screen: AnswerScreen | None = None
        if console.draws(sys.stdout):
            self._screen = AnswerScreen(folds=not talk.shows_thinking, markdown=talk.markdown)
        self._parts: Parting | None = None
        self._begun = False

    def __call__(self, text: str) -> None:
        self._begun = True
        if self._screen is None:
            console.stream(text)
            return
        if self._parts is None:
            self._parts = Parting(self._screen.thinking, self._screen.reply, open_mark(self._talk.chat.prompt_end))
        self._parts(text)

    def close(self, ended: bool = False) -> None:
        """No more text follows: the cursor goes to a line of its own. `ended`: there is an answer, if an empty one."""
        if self._parts and self._screen:
            self._parts.close()
            self._screen.close()
        elif self._begun or (ended and self._screen is None):
            echo()


def footer(answer: "Answer", chat: Chat) -> str:
    """Speed and memory of one answer, in a line."""
    facts = answer.to_json()
    speed, first = facts["timings"]["decode_tokens_per_s"], facts["timings"]["time_to_first_token_s"]
    parts = [f"{len(answer.token_ids)} tokens"]
    parts += [f"{speed:.1f} tokens/s"] if speed else []  # one token has no speed
    parts += [f"{format_bytes(facts['memory']['resident_bytes'])} resident", f"first token after {first:.2f} s"]
    parts += [f"{answer.report.turn}, {format_bytes(facts['io']['bytes_read'])} read"] if answer.report.turn else []
    verified = answer.report.lossless
    parts += (
        [f"{verified.passes} passes of {verified.tokens_per_pass:.1f} tokens"] if verified and verified.passes else []
    )
    parts += [str(answer.report.fidelity)] if answer.report.fidelity else []
    longer = "cut at max_new_tokens (/set max_new_tokens N)"
    end = ending(answer, chat.decoding.max_new_tokens, chat.engine.context_length, longer)
    parts += [end.removeprefix(f"cut after {len(answer.token_ids)} tokens: ")] if end else []
    parts += ["stopped"] if answer.finish_reason == "interrupted" else []
    return " · ".join(parts)


def context_note(chat: Chat) -> str | None:
    """What to do before the conversation is longer than the context: where another question and its answer, or an
    eighth of it, may not fit."""
    context, used = chat.engine.context_length, chat.used_tokens
    left = max(0, context - used)
    if not used or left >= max(chat.decoding.max_new_tokens, context // 8):
        return None
    shorter = SHORTER if left < chat.decoding.max_new_tokens else ""
    return f"{used:,} of {context:,} tokens of context are used, {left:,} are left: {OFFERS}{shorter}"


def shown_value(value: Any) -> str:
    """A setting as /set shows it."""
    if value is None or value == ():
        return "default"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def as_settings(text: str) -> str:
    """A text that names flags, with the chat's own way to change them: --rest int4 -> /set rest int4."""
    text = re.sub(r"(--rest \w+) without --method \w+", r"--method none and \1", text)
    return re.sub(r"--(?!device)([a-z-]+)", lambda flag: "/set " + flag[1].replace("-", "_"), text)
