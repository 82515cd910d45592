"""A tokenizer's chat template: which one of several, and the form in which it reads a message.

Most templates read a message's content as a text. Those made for multimodal families read a list of parts, and of a
text nothing, or its letters: a short conversation, rendered in each form, tells which of them reaches the prompt."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..errors import PromptError, one_line
from ..inputs import read_input
from .template_sandbox import TemplateTooLarge, bounded

Message = Mapping[str, Any]
Form = Literal["text", "parts"]
PROCESSORS = "chat_template.json", "processor_config.json"  # where multimodal families keep the template
_SAID = {"system": "griffinsystem", "user": "griffinuser", "assistant": "griffinassistant"}

_PRINTED = ("'text': 'griffin", '"text": "griffin')  # a list of parts as Python or JSON shows it


def take_processors_template(folder: Path, tokenizer: Any) -> None:
    """Gives a tokenizer without a chat template the one of its model's processor, if there is one."""
    for name in PROCESSORS:
        if getattr(tokenizer, "chat_template", None):
            return
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            tokenizer.chat_template = json.loads(read_input(folder / name)).get("chat_template")


class ChatTemplate:
    """The chat template of a tokenizer. `name`: of the model, for errors."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._forms: tuple[Form, Form] | None = None  # of a system message, and of the others

    def encode(self, messages: Sequence[Message], check: Callable[[str], None], **options: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins. `check` hears of the text before it is tokenized.

        Raises as `apply`, and what `check` raises."""
        options |= {"add_generation_prompt": True}
        if type(self._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return list(self.apply(messages, return_dict=False, **options))
        text = self.apply(messages, tokenize=False, **options)
        check(text)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def apply(self, messages: Sequence[Message], **options: Any) -> Any:
        """What transformers' apply_chat_template gives for a conversation.

        Raises PromptError where the template refuses it, or leaves the messages out."""
        if self._forms is None:
            self._forms = self._find_forms()
        try:
            return self._render(messages, *self._forms, **options)
        except Exception as error:  # the template is the checkpoint's own program (jinja)
            raise PromptError(f"{self._name}'s chat template refused the conversation: {one_line(error)}") from None

    def _render(self, messages: Sequence[Message], system: Form, others: Form, **options: Any) -> Any:
        told = [_in_form(m, system if m.get("role") == "system" else others) for m in messages]
        template = self._one_of_several()
        with bounded():
            return self._tokenizer.apply_chat_template(told, chat_template=template, **options)

    def _one_of_several(self) -> str | None:
        """The name of the template to use; None where there is one alone, without a name. Raises PromptError."""
        templates = self._tokenizer.chat_template
        if not isinstance(templates, dict) or "default" in templates:
            return None
        if len(templates) == 1:
            return str(next(iter(templates)))
        raise PromptError(
            f"{self._name} has several chat templates and none is the default: {', '.join(sorted(templates))}; give "
            "the prompt as it is (--raw), or name one of them default"
        )

    def _find_forms(self) -> tuple[Form, Form]:
        """The forms in which most of a short conversation reaches the prompt. Raises PromptError where the user's
        message does in none."""
        self._one_of_several()
        best: tuple[int, tuple[Form, Form]] = (0, ("text", "text"))
        refused = None
        for forms in (("text", "text"), ("parts", "parts"), ("text", "parts"), ("parts", "text")):
            for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",)):
                probe = [{"role": role, "content": _SAID[role]} for role in roles]
                try:
                    text = self._render(probe, *forms, tokenize=False, add_generation_prompt=True)  # type: ignore[arg-type]
                except TemplateTooLarge as error:
                    raise PromptError(f"{self._name}'s chat template is refused: {one_line(error)}") from None
                except Exception as error:  # of what it does not take, such as a system message
                    refused = refused or error
                    continue
                printed = any(mark in text for mark in _PRINTED)
                count = sum(_SAID[role] in text for role in roles) if _SAID["user"] in text and not printed else 0
                if count > best[0]:
                    best = count, forms  # type: ignore[assignment]
        if not best[0] and refused is not None:
            raise PromptError(f"{self._name}'s chat template refused the conversation: {one_line(refused)}")
        if not best[0]:
            raise PromptError(
                f"{self._name}'s chat template leaves out what the user says, as a text and as a list of parts: give "
                "the prompt as it is (--raw)"
            )
        return best[1]


def _in_form(message: Message, form: Form) -> dict[str, Any]:
    content = message.get("content")
    if form == "parts" and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif form == "text" and isinstance(content, list | tuple):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return {**message, "content": content}
