"""Scores of a continuation, token by token: from logits to Scored, and from many values to their mean.

C tokens of continuation, T of them in one forward; R rows of a batch, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...options import OnLayer
from ...planning.scoring import POSITIONS

Pair = tuple[list[int], list[int]]  # token ids of a context, and of its continuation


@dataclass(frozen=True)
class Scored:
    """Scores of one continuation, each (C,). `log_probability`: of the true token, nats, float32; `greedy`: the true
    token is the variant's likeliest one; `agrees`: the variant's likeliest token is the full model's; `kl`:
    KL(full model || variant) of the token's distribution, nats, float32; `acceptance`: Σ min(p, q) of the two."""

    log_probability: Tensor
    greedy: Tensor
    agrees: Tensor
    kl: Tensor
    acceptance: Tensor


class Comparison:
    """Compares logits with the full model's, a few tokens at a time, in memory taken once: fresh pages cost time.

    `truth`: the full model's logits (T, V), to be set before the first call over a continuation."""

    def __init__(self, vocabulary: int, device: str) -> None:
        self._scratch = torch.empty(4, POSITIONS, vocabulary, dtype=torch.float32, device=device)
        self.truth = torch.empty(0)

    def __call__(self, logits: Tensor, following: Tensor) -> list[Scored]:
        """Logits (R, T, V) and the true tokens (T,) -> scores of each row, as `reduce` has them."""
        rows: list[list[Scored]] = [[] for _ in logits]
        for begin in range(0, len(following), POSITIONS):
            part = slice(begin, begin + POSITIONS)
            theirs, weights, raw, ours = self._scratch[:, : len(following[part])]
            torch.log_softmax(raw.copy_(self.truth[part]), -1, out=theirs)
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
                    acceptance=torch.minimum(theirs, ours, out=raw).exp_().sum(-1),
                )
                row.append(scored)
        return [join(row) for row in rows]


def reduce(ours: Tensor, truth: Tensor, following: Tensor) -> Scored:
    """Log-probabilities (C, V) of the variant and of the full model, and the true tokens (C,) -> scores."""
    best = ours.argmax(-1)
    return Scored(
        log_probability=ours.gather(1, following[:, None])[:, 0],
        greedy=best == following,
        agrees=best == truth.argmax(-1),
        kl=(truth.exp() * (truth - ours)).sum(-1),
        acceptance=torch.minimum(truth, ours).exp().sum(-1),
    )


def join(parts: Sequence[Scored]) -> Scored:
    """Scores of consecutive tokens -> scores of all of them, on the CPU."""
    names = [field.name for field in fields(Scored)]
    return Scored(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in names))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; the error of a single value is 0."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, (variance / len(values)) ** 0.5


def progress_of(on_layer: OnLayer | None, number: int, passes: int) -> OnLayer:
    """A callback for pass `number` of several over the model, which reports the progress of all of them."""

    def tell(layer: int, layers: int) -> None:
        if on_layer:
            on_layer(number * layers + layer, passes * layers)

    return tell
