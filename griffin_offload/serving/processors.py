"""What acts on a token's logits, or looks at them: penalties, a grammar, logprobs. All for one sequence, (1, V).

They are called while a GPU computes the logits, and so do not wait for it: a grammar alone must, for the last token."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import GriffinError

if TYPE_CHECKING:
    from .grammar import Grammar

NEVER = -9999.0  # as OpenAI's API tells the logarithm of 0, which JSON cannot


@dataclass(frozen=True)
class Penalties:
    """OpenAI's: `presence` is taken from the logit of each token that the answer has, `frequency` as often as it has
    it; `bias` is added."""

    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.presence or self.frequency or self.bias)


class Penalise(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, penalties: Penalties, prompt: int) -> None:
        """`prompt`: its tokens, which count for no penalty."""
        self._penalties, self._prompt = penalties, prompt
        self._biases: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        changed, penalties, width = scores.clone(), self._penalties, scores.shape[1]
        tokens = input_ids[0, self._prompt :].clamp_max(width)
        counts = torch.zeros(width + 1, dtype=torch.int64, device=scores.device)
        counts = counts.index_add_(0, tokens, torch.ones_like(tokens))[:width]
        changed[0] -= penalties.frequency * counts + penalties.presence * (counts > 0)
        if self._biases is None:
            biases = torch.zeros(width)
            for token, value in penalties.bias.items():
                biases[token] = value
            self._biases = biases.to(scores.device)
        changed[0] += self._biases
        return changed


class Constrain(LogitsProcessor):  # type: ignore[misc]
    """Only tokens that a grammar allows next. Drafted tokens may be taken back."""

    def __init__(self, grammar: "Grammar", prompt: int) -> None:
        self._grammar, self._prompt = grammar, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._grammar.follow(input_ids[0, self._prompt :].tolist())
        mask = self._grammar.allowed()
        if not mask.any():
            raise GriffinError("the JSON schema allows no token that this model has")
        allowed = torch.from_numpy(mask).to(scores.device, non_blocking=scores.is_cuda)
        width = min(len(allowed), scores.shape[1])
        changed = torch.full_like(scores, -torch.inf)
        changed[0, :width] = scores[0, :width].masked_fill(~allowed[:width], -torch.inf)
        return changed


class Logprob(NamedTuple):
    """Of one token: the logarithm of its probability, and the likeliest tokens with theirs."""

    token: int
    value: float
    top: list[tuple[int, float]]


class Logprobs(LogitsProcessor):  # type: ignore[misc]
    """Keeps the distributions that the next tokens are drawn from, before temperature and the like: on the host, where
    each has arrived once its token has."""

    def __init__(self, top: int, prompt: int) -> None:
        self._top, self._next = top, prompt
        self._rows: dict[int, Tensor] = {}  # by the tokens before it; the full model's come after those of drafts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._rows[input_ids.shape[1]] = scores[0].float().log_softmax(-1).to("cpu", non_blocking=scores.is_cuda)
        return scores

    def of(self, token: int) -> Logprob:
        """Of the answer's next token."""
        row = self._rows.pop(self._next)
        self._next += 1
        values, tokens = row.topk(min(self._top, len(row)))
        top = list(zip(tokens.tolist(), values.clamp_min(NEVER).tolist(), strict=True))
        return Logprob(token, max(NEVER, float(row[token])), top)
