"""The plan for `--lossless`: what is resident drafts, the full model streams by and verifies.

Cost of a round: k drafted tokens of t_d seconds and a pass of t_v; it gives (1 - a^(k+1)) / (1 - a) tokens, where a
drafted token is accepted with probability a (Leviathan et al. 2023, arXiv:2211.17192)."""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from ..errors import BudgetError
from ..options import Pruning
from ..units import format_bytes
from .ladder import Way, best_plan
from .plan import Plan, check_request, enough, make_plan
from .request import Request
from .sizes import ModelSizes

MOST_DRAFTS = 32  # tokens: where three of a hundred fail, more add little
FEWER = (MOST_DRAFTS // 2, MOST_DRAFTS // 4)  # where memory is short: logits over a large vocabulary take a lot of it
STREAM = 2e9  # bytes a second from a disk, as long as none was measured: what is resident hardly depends on it
MEMORY = 2e10  # bytes a second of a token's products, where no speed was measured
EXPECTED, DROPPED = 0.97, 0.69  # acceptance of a draft with all neurons, and with half of them dropped


@dataclass(frozen=True)
class Draft(Way):
    """A way to keep a model that drafts, and the share of its tokens that the full model accepts: the lower of two
    models' (docs/results.md), where neurons are dropped another one's."""

    acceptance: float


DRAFTS = (
    Draft("bfloat16", 1.0, "int8", 0.971),
    Draft("bfloat16", 0.5, "int4", 0.960),
    Draft("bfloat16", 1.0, "int4", 0.968),
    Draft("int8", 0.0, "drop", 0.957),
    Draft("int4", 0.0, "drop", 0.964),
    Draft("bfloat16", 0.5, "drop", DROPPED),
    Draft("int4", 0.5, "drop", 0.6),
)


@dataclass(frozen=True)
class Lossless:
    """How an answer was drafted and verified. `passes` of the full model, of which each streamed `pass_bytes`;
    `drafted` tokens, of which `accepted` were the full model's; `failed`: passes that found a draft which was not;
    `looked_up`: drafted tokens that the text so far suggested; seconds: of drafting, and of passes; `close`: tokens
    that the rounding of the dtype could have decided.
    `why_not`: why nothing was drafted; '' where it was."""

    passes: int = 0
    pass_bytes: int = 0
    drafted: int = 0
    accepted: int = 0
    failed: int = 0
    looked_up: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    close: int = 0
    why_not: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the passes gave: each its accepted drafts, and one of its own."""
        return self.accepted + self.passes

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were accepted, of those whose forerunners were."""
        return self.accepted / (self.accepted + self.failed) if self.drafted else None

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes streamed for a token."""
        return self.passes * self.pass_bytes / self.tokens if self.passes else 0.0

    @property
    def speedup(self) -> float:
        """Times as fast as one pass for each token."""
        seconds = self.draft_s + self.verify_s
        return self.tokens_per_pass * self.verify_s / seconds if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        names = ("acceptance", "tokens_per_pass", "bytes_per_token", "speedup")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        """'12 passes for 240 tokens (20.0 each; ...'."""
        if self.why_not:
            return self.why_not
        if not self.passes:
            return "one token, of the prompt pass"
        looked_up = f", {self.looked_up} of them looked up" if self.looked_up else ""
        close = f"; {self.close} tokens were as good as tied, and rounding may decide" if self.close else ""
        return (
            f"{self.tokens} tokens by {self.passes} passes ({self.tokens_per_pass:.1f} each); {self.accepted} of "
            f"{self.drafted} drafts accepted{looked_up}; {format_bytes(round(self.bytes_per_token))} streamed a token; "
            f"drafting {self.draft_s:.2f} s, passes {self.verify_s:.2f} s: {self.speedup:.1f} x a pass for each{close}"
        )


def best_rate(acceptance: float, draft_s: float, pass_s: float, most: int) -> float:
    """Tokens a second at the best number of drafts, at most `most`, for one acceptance of all tokens."""
    tokens, chance, best = 1.0, 1.0, 1 / pass_s
    for drafts in range(1, most + 1):
        chance *= acceptance
        tokens += chance
        best = max(best, tokens / (drafts * draft_s + pass_s))
    return best


@lru_cache(maxsize=256)
def lossless_plan(sizes: ModelSizes, request: Request, pruning: Pruning, name: str) -> Plan:
    """The plan whose drafts and passes give most tokens a second; the whole model, if that fits. What `pruning` asks
    for is kept to. Raises what `best_plan` does."""
    request = check_request(sizes, request, name)
    asked = (pruning.sparsity, pruning.resident_dtype, pruning.rest)
    if any(each not in (None, "auto") for each in asked):
        for drafts in (request.drafts, *FEWER[:-1]):
            with suppress(BudgetError):
                return _as_asked(sizes, replace(request, drafts=drafts), pruning, name)
        return _as_asked(sizes, replace(request, drafts=FEWER[-1]), pruning, name)
    whole = make_plan(sizes, replace(request, sparsity=0.0, drafts=0))
    if whole.fits:
        return whole
    counts = product(DRAFTS, (request.drafts, *FEWER))
    plans = [(draft, make_plan(sizes, draft.asked(replace(request, drafts=count)))) for draft, count in counts]
    fitting = [(expected_tokens_per_s(plan, draft.acceptance), plan) for draft, plan in plans if plan.fits]
    if fitting:
        best = max(fitting, key=lambda found: found[0])[1]
        return replace(best, why_rest="the fastest drafts that fit the budget")
    draft, least = min(plans, key=lambda pair: pair[1].peak)
    if whole.peak <= least.peak:
        draft, least = Draft("bfloat16", 0.0, "drop", 1.0), whole
    needed, budget = least.too_much
    raise BudgetError(
        f"{name} needs at least {needed} ({draft}; {least.prompt_tokens} + "
        f"{least.max_new_tokens} tokens); the budget is {budget}. "
        f"Give --device-memory {enough(least)}, fewer tokens, or leave out --lossless",
        least.peak,
    )


def _as_asked(sizes: ModelSizes, request: Request, pruning: Pruning, name: str) -> Plan:
    plan = best_plan(sizes, request, pruning, name)
    return plan if plan.reads_again else replace(plan, drafts=0)


def expected_tokens_per_s(plan: Plan, acceptance: float) -> float:
    """Tokens a second that drafts of a plan give, as its speeds were measured, from a disk of `STREAM`."""
    draft_s = 1 / plan.tokens_per_s if plan.tokens_per_s else plan.bytes_per_token / MEMORY
    return best_rate(acceptance, draft_s, max(plan.streamed_bytes, 1) / STREAM, plan.drafts)
