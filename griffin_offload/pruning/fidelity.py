"""How close the resident model is to the full one on a prompt: figures of two models' logits.

P tokens, V vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

# What is kept on the answer, fitted to its acceptance (docs/results.md, scripts/fidelity_table.py): the neurons were
# chosen from the tokens that are read again, which flatters a short prompt more than a long one.
LOST, SHORTER, REFERENCE = 0.5, 0.25, 64  # 1 - kept = LOST sqrt(KL) (REFERENCE / tokens of the prompt)^SHORTER
LOW = 0.7  # of what is kept: below it the report warns
FEWEST = 2  # tokens that tell anything
ROOM = 2**21  # logits of each model that are compared at a time


@dataclass(frozen=True)
class Fidelity:
    """What the resident model keeps of the full model's predictions for the last `tokens` tokens of a prompt (of all
    prompts of a batch); means over them.

    `agreement`: both have the same likeliest token. `kl`: KL(full || resident), nats. `acceptance`: the sum of
    min(p, q), which is how often a token drawn from the resident model would pass for one of the full model's.
    `prompt_tokens`: of the whole prompt, of several on average. `seconds`: what the measurement took. `why_not`: why
    nothing was measured; the figures are 0 then."""

    tokens: int = 0
    agreement: float = 0.0
    kl: float = 0.0
    acceptance: float = 0.0
    prompt_tokens: float = 0.0
    seconds: float = 0.0
    why_not: str = ""

    @property
    def kept(self) -> float:
        """The acceptance to expect on the answer."""
        return max(0.0, 1 - LOST * sqrt(self.kl) * float((REFERENCE / self.prompt_tokens) ** SHORTER))

    @property
    def is_low(self) -> bool:
        return not self.why_not and self.kept < LOW

    def to_json(self) -> dict[str, Any]:
        if self.why_not:
            return {"why_not_measured": self.why_not}
        return {
            "kept": self.kept,
            "tokens": self.tokens,
            "agreement": self.agreement,
            "kl": self.kl,
            "acceptance": self.acceptance,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        """'keeps 0.93 of the full model's choices on this prompt', or why that is not known."""
        if self.why_not:
            return f"not measured: {self.why_not}"
        return f"keeps {self.kept:.2f} of the full model's choices on this prompt"


@torch.no_grad()
def compare(full: Tensor, resident: Tensor) -> Tensor:
    """Logits (P, V) of the full and of the resident model -> (P, 3), float32: agreement, KL, acceptance of each token.

    Holds four float32 tensors (P, V)."""
    agrees = (full.argmax(-1) == resident.argmax(-1)).float()
    theirs, ours = full.float().log_softmax(-1), resident.float().log_softmax(-1)
    apart = theirs - ours
    theirs.exp_()
    kl = apart.nan_to_num_(0.0).mul_(theirs).sum(-1)  # -inf - -inf: a token that neither model allows
    acceptance = torch.minimum(theirs, ours.exp_(), out=apart).sum(-1)
    return torch.stack([agrees, kl, acceptance], -1)


def mean_fidelity(figures: Iterable[Tensor], prompt_tokens: float, seconds: float) -> Fidelity:
    """Figures (P, 3) of one prompt or more, as `compare` gives them -> their means over all tokens.

    `prompt_tokens`: of a whole prompt, on average."""
    all_tokens = torch.cat(list(figures)).double()
    agreement, kl, acceptance = all_tokens.mean(0).tolist()
    return Fidelity(len(all_tokens), agreement, max(0.0, kl), acceptance, prompt_tokens, seconds)
