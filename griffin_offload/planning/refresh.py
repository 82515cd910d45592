"""How often an answer's neurons were chosen again while it was made, and what that took."""

from dataclasses import asdict, dataclass
from typing import Any

from ..units import format_bytes


@dataclass(frozen=True)
class Refreshes:
    """`count` passes of the full model over the answer's latest tokens, every `every` tokens; seconds and bytes read of
    all of them."""

    every: int
    count: int
    seconds: float
    bytes_read: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """'3 times, every 64 tokens: 2.10 s, 1.9 GiB read'."""
        if not self.count:
            return "not once: the answer was short, or the full model's"
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"{times}, every {self.every} tokens: {self.seconds:.2f} s, {format_bytes(self.bytes_read)} read"
