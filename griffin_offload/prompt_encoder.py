"""Prompts -> token ids that a model can read: text, or conversations by its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import BudgetError, ContextError, PromptError
from .model.chat_template import ChatTemplate, Message
from .model.long_texts import PIECE, has_more_tokens
from .model.multimodal import refuse_media
from .units import format_bytes


@dataclass(frozen=True)
class PromptEncoder:
    """Of one model, by `name`. `rows`: of its table of embeddings; `context`: the most tokens that it reads; `fits`:
    the most whose hidden states `budget`, in bytes, has room for."""

    name: str
    tokenizer: Any
    rows: int
    context: int
    fits: int
    budget: int

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, prompt: str, *, system: str | None = None, raw: bool = False, cut: bool = False) -> list[int]:
        """Token ids of one user turn in the chat template, or of the bare text (`raw`, or no template). `cut`: the
        text may be longer than the model reads. Raises PromptError, ContextError, BudgetError."""
        if not prompt.strip():
            raise PromptError("the prompt is empty: give some text")
        if raw or not self.has_chat_template:
            if system:
                raise PromptError("--system needs a model with a chat template, and no --raw")
            if not cut:
                self._check_length(prompt)
            return self.check_tokens(list(self.tokenizer(prompt)["input_ids"]))
        turns = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*turns, {"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins. `options`: what the chat template may be told
        beside it, such as `tools`. Raises PromptError without a chat template, and for images and other media;
        ContextError, BudgetError."""
        refuse_media(messages)
        if not self.has_chat_template:
            raise PromptError(f"{self.name} has no chat template: use `griffin generate --raw`")
        ids = self.chat_template.encode(messages, check=self._check_length, **options)
        return self.check_tokens(ids)

    def _check_length(self, text: str) -> None:
        """Before a text is tokenized, which takes hundreds of bytes a token. Raises ContextError for more tokens than
        the model reads, BudgetError for more than the budget has room for."""
        most = min(self.context, self.fits)
        if len(text) > PIECE and has_more_tokens(self.tokenizer, text, most):
            told = f"the prompt, {format_bytes(len(text))} of text, has more than {most} tokens"
            if self.context <= self.fits:
                raise ContextError(f"{told}; {self.name} reads at most {most}, answer included")
            raise BudgetError(f"{told}, and {format_bytes(self.budget)} hold no more: give fewer, or more memory")

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """What makes a prompt of a conversation. It is there even where the tokenizer has no template."""
        return ChatTemplate(self.tokenizer, self.name)

    def check_tokens(self, ids: list[int]) -> list[int]:
        """The same ids. Raises PromptError for a token that the table of embeddings has no row for."""
        if (wrong := next((token for token in ids if not 0 <= token < self.rows), None)) is not None:
            text = self.tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 else None
            token = f"{wrong} ({text!r})" if text else wrong
            raise PromptError(
                f"token {token} has no row in {self.name}'s table of {self.rows} embeddings: "
                "the tokenizer has tokens that the model was never resized for; leave them out of the prompt"
            )
        return ids
