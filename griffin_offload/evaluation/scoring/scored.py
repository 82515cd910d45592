"""What is told of a continuation, token by token: from logits to Scored, and from many values to a mean.

C tokens of continuation, T of them in one forward; R rows of a batch, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

POSITIONS = 32  # of the logits in float32 at a time
Pair = tuple[list[int], list[int]]  # token ids of a context, and of its continuation


@dataclass(frozen=True)
class Scored:
    """Of one continuation, token by token (C,). `log_probability`: of the true token, nats, float32;
    `greedy`: the true token is the variant's most likely one; `agrees`: the variant's most likely token is the full
    model's; `kl`: divergence of the variant's distribution from the full model's, KL(full || variant), nats, float32.
    """

    log_probability: Tensor
    greedy: Tensor
    agrees: Tensor
    kl: Tensor


class Compare:
    """Logits beside the full model's, a few places at a time and in memory taken once: fresh pages cost time."""

    def __init__(self, vocabulary: int, device: str) -> None:
        self._scratch = torch.empty(4, POSITIONS, vocabulary, dtype=torch.float32, device=device)

    def __call__(self, logits: Tensor, truth: Tensor, following: Tensor) -> list[Scored]:
        """Logits (R, T, V), the full model's (T, V) and the true tokens (T,) -> each row's, as `reduce` has it."""
        rows: list[list[Scored]] = [[] for _ in logits]
        for begin in range(0, len(truth), POSITIONS):
            part = slice(begin, begin + POSITIONS)
            theirs, weights, raw, ours = self._scratch[:, : len(truth[part])]
            torch.log_softmax(raw.copy_(truth[part]), -1, out=theirs)
            torch.exp(theirs, out=weights)
            best = theirs.argmax(-1)
            for row, of_row in zip(rows, logits, strict=True):
                torch.log_softmax(raw.copy_(of_row[part]), -1, out=ours)
                likely = ours.argmax(-1)
                scored = Scored(
                    log_probability=ours.gather(1, following[part, None])[:, 0],
                    greedy=likely == following[part],
                    agrees=likely == best,
                    kl=torch.sub(theirs, ours, out=raw).mul_(weights).sum(-1),
                )
                row.append(scored)
        return [join(row) for row in rows]


def reduce(ours: Tensor, truth: Tensor, following: Tensor) -> Scored:
    """Log-probabilities of the variant and of the full model, each (C, V), and the true tokens, (C,)."""
    best = ours.argmax(-1)
    return Scored(
        log_probability=ours.gather(1, following[:, None])[:, 0],
        greedy=best == following,
        agrees=best == truth.argmax(-1),
        kl=(truth.exp() * (truth - ours)).sum(-1),
    )


def join(parts: Sequence[Scored]) -> Scored:
    """One behind the other, on the CPU."""
    names = [field.name for field in fields(Scored)]
    return Scored(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in names))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: 0 for a single value, which has no spread."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, (variance / len(values)) ** 0.5
