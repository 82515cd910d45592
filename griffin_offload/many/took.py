"""What batches of prompts took, and what bounds a run of many: reading, the bus, computing or memory bandwidth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..memory.stage_clock import NAMES
from ..units import format_bytes

if TYPE_CHECKING:
    from ..run import Answer

MEMORY = "memory bandwidth"


@dataclass(frozen=True)
class Took:
    """One batch, or several together. Tokens of the prompts and of the answers; bytes read; seconds of the prompt
    passes and of decoding.

    `stages`: how long each stage of the passes worked, by its name in words; a pass for which nothing was read is
    computing. `memory_s`: of decoding, how long it takes at least to read the weights from memory, where that speed
    is known."""

    prompts: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    bytes_read: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    memory_s: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "Took") -> "Took":
        numbers = ("prompts", "prompt_tokens", "tokens", "bytes_read", "prompt_s", "decode_s", "memory_s")
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        stages = {name: self.stages.get(name, 0.0) + other.stages.get(name, 0.0) for name in NAMES.values()}
        return Took(**sums, stages=stages)

    @property
    def bound_by(self) -> str:
        """What the longer part of the time is bound by, in words."""
        passes = max(self.stages, key=self.stages.__getitem__, default=NAMES["compute"])
        decoding = MEMORY if self.memory_s >= self.decode_s / 2 else NAMES["compute"]
        return passes if self.prompt_s >= self.decode_s else decoding


def took(answers: Sequence["Answer"], per_prompt: bool) -> Took:
    """What one batch took, whose answers share a report. `per_prompt`: each prompt has neurons of its own."""
    report, lengths = answers[0].report, [len(answer.token_ids) for answer in answers]
    steps = sum(lengths) - len(lengths) if per_prompt and report.plan.reads_again else max(lengths) - 1
    memory_s = steps * report.bytes_per_token / report.memory_bandwidth if report.memory_bandwidth else 0.0
    stages = {NAMES["compute"]: report.prompt_s}
    if report.stages:
        stages = {word: getattr(report.stages, name) for name, word in NAMES.items()}
    return Took(
        prompts=len(answers),
        prompt_tokens=sum(len(answer.prompt_token_ids) for answer in answers),
        tokens=sum(lengths),
        bytes_read=report.bytes_read,
        prompt_s=report.prompt_s,
        decode_s=report.decode_s,
        memory_s=memory_s,
        stages=stages,
    )


@dataclass(frozen=True)
class Throughput:
    """What a run of many prompts did in so many `seconds`, by all its workers."""

    took: Took
    seconds: float

    def to_json(self) -> dict[str, Any]:
        took, seconds = self.took, max(self.seconds, 1e-9)
        return {
            "answered": took.prompts,
            "seconds": self.seconds,
            "prompts_per_s": took.prompts / seconds,
            "prompt_tokens_per_s": took.prompt_tokens / seconds,
            "tokens_per_s": took.tokens / seconds,
            "bytes_read": took.bytes_read,
            "bytes_read_per_prompt": took.bytes_read / took.prompts if took.prompts else 0.0,
            "prompt_s": took.prompt_s,
            "decode_s": took.decode_s,
            "stages": dict(took.stages),
            "memory_s": took.memory_s,
            "bound_by": took.bound_by,
        }

    def __str__(self) -> str:
        """'3.02 prompts/s, 251 prompt tokens/s, 71 tokens/s of answers; 4.2 MiB read a prompt; bound by computing'."""
        each = self.to_json()
        rates = f"{each['prompts_per_s']:.3g} prompts/s, {each['prompt_tokens_per_s']:.0f} prompt tokens/s, "
        rates += f"{each['tokens_per_s']:.3g} tokens/s of answers"
        read = f"{format_bytes(round(each['bytes_read_per_prompt']))} read a prompt"
        parts = f"passes {self.took.prompt_s:.1f} s, decoding {self.took.decode_s:.1f} s"
        return f"{rates}; {read}; bound by {self.took.bound_by} ({parts})"
