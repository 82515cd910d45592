"""The text that ships with Griffin, shipped_text.jsonl, written for it and for no model: every model's prior is
measured on it, and how much each layer matters.

Questions with their answers, on everyday things and on code, and passages of prose and code."""

import hashlib
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("shipped_text.jsonl")
LONGEST = 256  # tokens of a sample
TURN = "{content}\n\n"  # of an exchange, for a model without a chat template


def shipped_samples(tokenizer: Any, has_chat_template: bool) -> list[list[int]]:
    """Token ids of each exchange and passage, at most LONGEST.

    An exchange is in the chat template with its answer, or plain text where the model has none, or one that refuses."""
    samples = []
    for line in PATH.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = _chat(tokenizer, row["messages"]) if has_chat_template and "messages" in row else None
        samples.append((ids or list(tokenizer(_plain(row), verbose=False)["input_ids"]))[:LONGEST])
    return samples


def shipped_text_hash() -> str:
    """SHA-256 of the text, as hex: a stored prior of another text is measured again."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest()


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int] | None:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception:  # the template is the checkpoint's own program (jinja): it may refuse anything
        return None


def _plain(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    return "".join(TURN.format(**message) for message in row["messages"]).rstrip()
