"""What is served: the model by its names, the options of its answers, the limits of a request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..options import Decoding, Pruning
from ..paths import source_name
from ..units import MIB
from .api_error import ApiError, invalid
from .reply import thinks_already
from .tools import CallForm, find_form

if TYPE_CHECKING:
    from ..engine import Engine

TAIL = 32  # tokens at the end of a prompt: more than a template writes to begin an answer


@dataclass(frozen=True)
class Limits:
    """Of requests: `body` bytes, `tokens` of prompt and answer together (None: the model's context), `waiting` requests
    behind the one that is answered, `choices` of one request."""

    body: int = 4 * MIB
    tokens: int | None = None
    waiting: int = 16
    choices: int = 16


@dataclass(frozen=True)
class Served:
    """A model and how it answers where a request does not say otherwise. `aliases`: other names that it answers to;
    `reuse`: of a prompt only what no earlier request has computed is computed."""

    engine: "Engine"
    pruning: Pruning = field(default_factory=Pruning)
    decoding: Decoding = field(default_factory=Decoding)
    aliases: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    reuse: bool = True

    @cached_property
    def name(self) -> str:
        """The model's name, without the folder that it is in."""
        return source_name(self.engine.name, self.engine.path)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError for another model's name: it is compared, never opened."""
        if model is not None and model not in (self.name, *self.aliases):
            have = " or ".join((self.name, *self.aliases))
            raise ApiError(404, f"no model {model[:100]!r} here: ask for {have}", param="model", code="model_not_found")

    @cached_property
    def calls(self) -> CallForm | None:
        """How the chat template has tools called."""
        templates = getattr(self.engine.tokenizer, "chat_template", None)
        if isinstance(templates, dict):
            templates = templates.get("default") or next(iter(templates.values()))
        return find_form(templates or "")

    @property
    def tokens(self) -> int:
        """Most tokens of a prompt and its answer."""
        return min(self.limits.tokens or self.engine.context_length, self.engine.context_length)

    def answer_tokens(self, prompt_ids: list[int], asked: int | None, default: int) -> int:
        """Tokens that an answer may have: what is asked, as far as the limit has room. Raises ApiError."""
        room = self.tokens - len(prompt_ids)
        if room < 1:
            raise invalid(
                "messages",
                f"the prompt has {len(prompt_ids)} tokens: prompt and answer have at most {self.tokens} here",
                "context_length_exceeded",
            )
        return min(asked or default, room)

    def encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """Token ids of a conversation; `options`: of its chat template."""
        return self.engine.encode_chat(messages, **options)

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that goes on behind others."""
        return list(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def thinks_already(self, prompt_ids: list[int]) -> str:
        """The mark that ends the thinking which a prompt has begun; '' if it has not."""
        return thinks_already(str(self.engine.tokenizer.decode(prompt_ids[-TAIL:], skip_special_tokens=False)))
