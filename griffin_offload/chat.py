"""A conversation and its turns. Each answer runs the sweep over the whole conversation.

A model with a chat template is asked through it. One without (a base model) continues a plain transcript,
"User: ...\\nAssistant:", and its answer is cut where it begins to speak for the user.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GriffinError, OptionError
from .options import (
    ALLOCATIONS,
    AUTO,
    DRAWN,
    RESIDENT_DTYPES,
    RESTS,
    SELECTIONS,
    SKIP_MODES,
    FfnSkip,
    OnLayer,
    OnText,
    check,
)

if TYPE_CHECKING:
    from .engine import Engine
    from .generation import Answer
    from .options import (
        ALLOCATIONS,
        AUTO,
        DRAWN,
        RESIDENT_DTYPES,
        RESTS,
        SELECTIONS,
        SKIP_MODES,
        OnLayer,
        OnText,
        check,
    )

FORMAT = "griffin-conversation"
NAMED = {
    "selection": SELECTIONS,
    "allocation": ALLOCATIONS,
    "resident_dtype": (AUTO, *RESIDENT_DTYPES),
    "rest": RESTS,
}
WHOLE = {"max_new_tokens": int, "top_k": int, "seed": int, "ffn_skip_warmup": int, "ffn_skip_run": int}
STOP = "\nUser:"


@dataclass(frozen=True)
class Settings:
    """How to answer. None leaves it to the engine (sparsity, resident_dtype, rest) or to the model's own generation
    config (sampling).

    Any of temperature, top_p, top_k and seed asks for sampling (a seed not where it is the selection's). `sparsity`
    may be one for each layer. `prior`: a file of `griffin export-pruned --prior-out`. `ffn_skip` is a share (0 skips
    nothing), its other fields are Skip's; None: its default. Raises OptionError for a value outside its range.
    """

    sparsity: float | tuple[float, ...] | None = None
    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    greedy: bool = False
    selection: str = "topk"
    allocation: str = "uniform"
    resident_dtype: str | None = None
    rest: str | None = None
    prior: str | None = None
    prior_weight: float | None = None
    ffn_skip: float = 0.0
    ffn_skip_mode: str = "token"
    ffn_skip_cold: tuple[int, int] | None = None
    ffn_skip_warmup: int | None = None
    ffn_skip_run: int | None = None

    def __post_init__(self) -> None:
        def within(name: str, ok: Callable[[Any], bool], allowed: str) -> None:
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else () if value is None else (value,):
                if not (math.isfinite(each) and ok(each)):
                    raise OptionError(f"{name} {each} is outside its range: {allowed}")

        within("sparsity", lambda x: 0 <= x <= 1, "0 (nothing is pruned) to 1 (no neuron is kept)")
        for name, known in NAMED.items():
            if getattr(self, name) is not None:
                check(getattr(self, name), known, name)
        within("max_new_tokens", lambda x: x >= 1, "1 or more")
        within("temperature", lambda x: x > 0, "above 0; for the likeliest token every time ask for greedy")
        within("top_p", lambda x: 0 < x <= 1, "above 0, up to 1")
        within("top_k", lambda x: x >= 0, "0 (off) or more")
        within("prior_weight", lambda x: 0 <= x <= 1, "0 (the prompt's own choice) to 1 (the prior's)")
        within("seed", lambda x: 0 <= x < 2**32, "0 to 4294967295")
        within("ffn_skip", lambda x: 0 <= x <= 1, "0 (no block is skipped) to 1 (all that are not cold)")
        check(self.ffn_skip_mode, SKIP_MODES, "ffn_skip_mode")
        within("ffn_skip_cold", lambda x: x >= 0, "two numbers, 0 or more")
        within("ffn_skip_warmup", lambda x: x >= 0, "0 or more")
        within("ffn_skip_run", lambda x: x >= 0, "0 (as few as reach the share) or more")
        if self.greedy and self.sampling():
            raise OptionError(f"greedy takes the likeliest token every time: {', '.join(self.sampling())} cannot act")

    def sampling(self) -> list[str]:
        """Names of the sampling options that are set."""
        names = ("temperature", "top_p", "top_k", "seed")[: 3 if self.selection in DRAWN else 4]
        return [name for name in names if getattr(self, name) is not None]

    def skip(self) -> FfnSkip | None:
        """Which blocks are skipped; None: none of them."""
        if not self.ffn_skip:
            return None

        names = ("cold", "warmup", "run")
        given = {name: value for name in names if (value := getattr(self, f"ffn_skip_{name}")) is not None}
        return FfnSkip(self.ffn_skip, self.ffn_skip_mode, **given)

    def with_text(self, name: str, text: str) -> "Settings":
        """The same, with one value read from text; 'none' takes it back to its default. Raises OptionError."""
        defaults = {field.name: field.default for field in fields(self)}
        if name not in defaults:
            raise OptionError(f"no setting is called {name!r}: there are {', '.join(defaults)}")
        value: Any
        try:
            if text.lower() in ("none", "default"):
                value = defaults[name]
            elif name == "greedy":
                value = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}[text.lower()]
            elif name in (*NAMED, "prior", "ffn_skip_mode"):
                value = text
            elif name == "ffn_skip_cold":
                first, last = text.split(",")
                value = int(first), int(last)
            else:
                value = WHOLE.get(name, float)(text)
        except (ValueError, KeyError):
            wanted = {**dict.fromkeys(WHOLE, "a whole number"), "greedy": "on or off", "ffn_skip_cold": "FIRST,LAST"}
            raise OptionError(f"{name} cannot be {text!r}: give {wanted.get(name, 'a number')}, or none") from None
        return replace(self, **{name: value})

    def prior_arguments(self) -> dict[str, Any]:
        """The prior and its weight, as Engine's methods take them. Raises GriffinError for a file that is no prior."""
        if self.prior is None:
            return {}
        from .pruning.prior import load_prior

        weight = {} if self.prior_weight is None else {"prior_weight": self.prior_weight}
        return {"prior": load_prior(Path(self.prior).expanduser()), **weight}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `Engine.generate`. Reads the prior's file: raises GriffinError where it is none."""
        names: tuple[str, ...] = ("sparsity", "max_new_tokens", "seed", *NAMED)
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        chosen |= self.prior_arguments()
        if skip := self.skip():
            chosen["skip"] = skip
        if self.greedy:
            return chosen | {"do_sample": False}
        if self.sampling():
            chosen["do_sample"] = True
        names = ("temperature", "top_p", "top_k")
        return chosen | {name: getattr(self, name) for name in names if getattr(self, name) is not None}


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

    def undo(self) -> str | None:
        """Remove the newest exchange, answered or not. Returns its user message; None if there is nothing."""
        self.drop_answer()
        return self._turns.pop()["content"] if self._turns else None

    def clear(self) -> None:
        """Forget the messages; the system text stays."""
        self._turns.clear()

    def save(self, path: Path) -> None:
        """Write as JSON: whole or not at all. Replaces only another saved conversation. Raises GriffinError."""
        if path.exists():
            try:
                Conversation.load(path)
            except GriffinError:
                raise GriffinError(f"{path} exists and is not a saved conversation: choose another name") from None
        content = {"format": FORMAT, "version": 1, "system": self.system, "messages": self._turns}
        try:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(content, file, ensure_ascii=False, indent=1)
                    file.write("\n")
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except (OSError, ValueError) as error:
            raise GriffinError(f"cannot save the conversation as {path}: {_reason(error)}") from error

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read what `save` wrote, checking every field. Raises GriffinError."""
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise GriffinError(f"cannot load a conversation from {path}: {_reason(error)}") from error

        def need(ok: bool, what: str) -> None:
            if not ok:
                raise GriffinError(f"{path} is not a saved conversation: {what}")

        need(isinstance(content, dict) and content.get("format") == FORMAT, f'no "format": "{FORMAT}"')
        need(content.get("version") == 1, f"version {content.get('version')!r}; this Griffin reads version 1")
        need(isinstance(content.get("system"), str | None), "the system text is not text")
        turns = content.get("messages")
        need(isinstance(turns, list), "no list of messages")
        need(len(turns) % 2 == 0, f"{len(turns)} messages: the last question has no answer")
        result = cls(content.get("system"))
        for index, turn in enumerate(turns):
            role = ("user", "assistant")[index % 2]
            ok = isinstance(turn, dict) and turn.get("role") == role and isinstance(turn.get("content"), str)
            need(ok, f"message {index + 1} should have the role {role!r} and a text as its content")
            result._turns.append({"role": role, "content": turn["content"]})
        return result


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return f"it is not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def transcript(messages: list[dict[str, str]]) -> str:
    """A conversation as plain text that a base model continues with the next answer."""
    names = {"user": "User: ", "assistant": "Assistant: "}
    parts = [names.get(message["role"], "") + message["content"] for message in messages]
    if messages and messages[0]["role"] == "system":
        parts[0] += "\n"
    return "\n".join([*parts, "Assistant:"])


class UntilStop:
    """Pass text on up to the stop string, without the white space before it begins.

    Text that may be the beginning of the stop string is held back until the next piece decides."""

    def __init__(self, on_text: OnText, stop: str = STOP) -> None:
        self.text = ""  # what was passed on
        self.done = False  # the stop string was there
        self._on_text, self._stop, self._held = on_text, stop, ""

    def __call__(self, piece: str) -> None:
        if self.done:
            return
        self._held += piece
        if not self.text:
            self._held = self._held.lstrip()
        end = self._held.find(self._stop)
        if end >= 0:
            self.done = True
        else:
            # The longest tail that the stop string begins with stays here.
            tails = range(min(len(self._stop) - 1, len(self._held)), -1, -1)
            end = len(self._held) - next(n for n in tails if self._held.endswith(self._stop[:n]))
        self._pass(end)

    def close(self) -> str:
        """Nothing more will come. Returns all the text that was passed on: a beginning of the stop string is not."""
        self.done = True
        return self.text

    def _pass(self, end: int) -> None:
        ready, self._held = self._held[:end], self._held[end:]
        if ready:
            self.text += ready
            self._on_text(ready)


def _stop_when(done: Callable[[], bool]) -> Any:
    """A criterion for transformers' generate. Its own stop_strings go over the whole vocabulary first: with 262144
    entries that takes seconds and hundreds of MiB."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stop(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), done(), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Stop()])


class Chat:
    """An engine and one conversation with it."""

    def __init__(self, engine: "Engine", settings: Settings | None = None, system: str | None = None) -> None:
        self.engine = engine
        self.settings = settings or Settings()
        self.conversation = Conversation(system)

    def prompt_ids(self) -> list[int]:
        """Token ids of the whole conversation, up to where the next answer begins."""
        if self.engine.has_chat_template:
            return self.engine.encode_chat(self.conversation.messages)
        return self.engine.encode(transcript(self.conversation.messages), raw=True)

    def ask(self, text: str, *, on_text: OnText | None = None, on_layer: OnLayer | None = None) -> "Answer":
        """Answer one more user message. If that fails, or is interrupted before the first token, it is taken back.

        An answer interrupted later is kept as far as it came (finish_reason "interrupted")."""
        self.conversation.add_user(text)
        try:
            return self._answer(on_text, on_layer)
        except BaseException:
            self.conversation.undo()
            raise

    def regenerate(self, *, on_text: OnText | None = None, on_layer: OnLayer | None = None) -> "Answer":
        """Answer the last user message again. If that fails, the old answer stays. Raises GriffinError."""
        old = self.conversation.drop_answer()
        if old is None:
            raise GriffinError("there is no answer yet to give again")
        try:
            return self._answer(on_text, on_layer)
        except BaseException:
            self.conversation.add_assistant(old)
            raise

    def _answer(self, on_text: OnText | None, on_layer: OnLayer | None) -> "Answer":
        arguments = self.settings.arguments()
        ids = self.prompt_ids()
        if self.engine.has_chat_template:
            generation = self.engine.generate(ids, on_text=on_text, on_layer=on_layer, **arguments)
            self.conversation.add_assistant(generation.text)
            return generation
        until = UntilStop(on_text or (lambda text: None))
        criteria = _stop_when(lambda: until.done)
        generation = self.engine.generate(
            ids, on_text=until, on_layer=on_layer, stopping_criteria=criteria, **arguments
        )
        self.conversation.add_assistant(until.close().rstrip())
        return generation
