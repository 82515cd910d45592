"""Rows of a file of prompts: what they may hold, how they are put to a model, and what is written of an answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..jsonl import Row

if TYPE_CHECKING:
    from ..engine import Engine
    from ..run import Answer

ROLES = ("system", "user", "assistant")
MESSAGE = f'{{"role": {" or ".join(ROLES)}, "content": a text}}'


@dataclass(frozen=True)
class PromptForm:
    """How a prompt is put to the model: after a system text, or `raw`, without the chat template."""

    system: str | None = None
    raw: bool = False

    def encode(self, engine: "Engine", prompt: str) -> list[int]:
        return engine.encode(prompt, system=self.system, raw=self.raw)

    def encode_row(self, engine: "Engine", row: Row) -> list[int]:
        """A row's own system text comes before the form's. Raises PromptError."""
        if "messages" not in row:
            return PromptForm(row.get("system", self.system), self.raw).encode(engine, row["prompt"])
        has_system = row["messages"][0]["role"] == "system"
        head = [{"role": "system", "content": self.system}] if self.system and not has_system else []
        return engine.encode_chat([*head, *row["messages"]])


def fault(row: Row, raw: bool) -> str | None:
    """What makes a row unfit, whatever the model; None for nothing."""
    faults = (
        (("prompt" in row) == ("messages" in row), 'give either a "prompt" or "messages"'),
        (not isinstance(row.get("prompt", ""), str), 'the "prompt" is not a text'),
        ("messages" in row and not are_messages(row["messages"]), f'"messages" are a list of {MESSAGE}'),
        (not isinstance(row.get("system", ""), str), 'the "system" is not a text'),
        ("system" in row and "messages" in row, 'a "system" beside "messages": make it their first'),
        (raw and ("system" in row or "messages" in row), "--raw leaves out the chat template, which this row needs"),
    )
    return next((text for wrong, text in faults if wrong), None)


def are_messages(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and is_content(turn.get("content")) for turn in turns
    )


def is_content(value: Any) -> bool:
    """A text, or a list of parts: of text, or of media, which the engine refuses with the reason."""
    parts = value if isinstance(value, list) else []
    return isinstance(value, str) or (bool(parts) and all(isinstance(part, dict) and is_part(part) for part in parts))


def is_part(part: Row) -> bool:
    return isinstance(part.get("type"), str) and (part["type"] != "text" or isinstance(part.get("text"), str))


def to_row(answer: "Answer") -> Row:
    """What is written of an answer, less its id. The timings are the batch's."""
    values = answer.to_json()
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.prompt_token_ids),
        "tokens": len(answer.token_ids),
        "sparsity": values["sparsity"],
        "timings": {name: round(values["timings"][name], 3) for name in ("prompt_s", "decode_s")},
    }
