"""What a turn of a conversation cost: tokens of its prompt that were kept, and computed; and what a batch shared."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shared:
    """How many tokens that all prompts of a batch begin with were taken from one pass over them; 0: why not, or ''
    where there are none."""

    tokens: int
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Turn:
    """How a turn of a conversation came by its prompt: tokens whose keys and values were kept from earlier turns,
    tokens that were computed, and why none were kept; '' where some were, or where this was the first turn."""

    kept_tokens: int
    computed_tokens: int
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """'30 of 230 prompt tokens computed'."""
        text = f"{self.computed_tokens} of {self.kept_tokens + self.computed_tokens} prompt tokens computed"
        return f"{text} ({self.why_not})" if self.why_not else text
