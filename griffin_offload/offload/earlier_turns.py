"""What a conversation keeps of its earlier turns, so that the next one computes its new tokens only.

The KV cache stays, as far as the full model computed it: a pruned model's own tokens are computed again with the next
turn's. The statistics of the neurons stay too. They are sums over tokens, so that the next turn adds its own. They are
kept for some points to which a conversation may go back: the ends of the last turns, and a few tokens before each,
since many a chat template rewrites how the answer begins (<think>) once it is there. So are recurrent states, where a
model has them: it goes back to such a point.
F neurons, E routed experts, V entries of the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model.kv_cache import cut_back, has_first, held_tokens, kept_points, mark
from ..options import DRAWN, Pruning
from ..planning.plan import Plan
from ..planning.rows import KEPT_STATISTICS
from ..planning.sizes import Kept
from ..pruning.fidelity import Fidelity
from ..quant.precision import Precision

Statistics = Sequence[tuple[Tensor | None, ...]]  # by layer and block: (F,) or (E, F), float32; None: not pruned
REWRITTEN = 16  # tokens at the end of a turn's prompt: how an answer begins


@dataclass(frozen=True)
class TurnStatistics:
    """The statistics of one turn's pass. They begin with those of the turns before, `earlier`, which count `times`;
    `until` takes them as they are after the pass's first tokens, `count` of them."""

    earlier: Statistics | None
    until: Statistics | None = None
    count: int = 0
    times: float = 1.0

    def begin(self, layer: int, block: int, total: Tensor) -> tuple[int, Tensor] | None:
        """Before a layer: lays the earlier statistics in `total`. Returns what the first tokens are to be added to."""
        if self.earlier and (earlier := self.earlier[layer][block]) is not None:
            total.copy_(earlier).mul_(self.times)
        until = self.until[layer][block] if self.until else None
        return None if until is None else (self.count, until.copy_(total))


def covering(known: Statistics, kept: Kept, neurons: Kept) -> Statistics | None:
    """These statistics, if they are known for all blocks of which less than the `neurons` are `kept`."""
    each = zip(known, kept, neurons, strict=True)
    pruned = [total for layer in each for total, k, n in zip(*layer, strict=True) if k < n]
    return None if any(total is None for total in pruned) else known


@dataclass(frozen=True)
class Answered:
    """The prompt that was answered last by what is in memory: its `plan`, what was asked for, the full model's logits
    of its last token (1, 1, V), and how close to it the resident model was on it."""

    plan: Plan
    pruning: Pruning
    logits: Tensor
    fidelity: Fidelity | None


class EarlierTurns:
    """Of one conversation: its token ids and their cache. Empty where there is none."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.pruning: Pruning | None = None  # that the last turn asked for
        self.resident: tuple[Kept, Precision] | None = None  # where the conversation was saved: what was in memory
        self.answered: Answered | None = None  # None: other neurons may be in memory
        self._ids: list[int] = []  # the cache holds the full model's keys and values of these
        self._statistics: dict[int, Statistics] = {}  # by the number of tokens that they are of

    def clear(self) -> None:
        self.cache, self.pruning, self.resident, self.answered = None, None, None, None
        self._ids, self._statistics = [], {}

    def saved(self) -> tuple[Any, list[int], dict[int, Statistics]]:
        """The cache, the tokens that it is of, and the statistics by the number of tokens that they are of."""
        return self.cache, self._ids, self._statistics

    def restore(self, cache: Any, ids: Sequence[int], statistics: Mapping[int, Statistics]) -> None:
        """Makes this what another one was, whose `saved` this is."""
        self.cache, self._ids, self._statistics = cache, list(ids), dict(statistics)

    def may_repeat(self, ids: Sequence[int], pruning: Pruning) -> Answered | None:
        """The prompt that was answered last, if these ids are its, and another answer may begin where that one did."""
        last = self.answered
        if last is None or last.pruning != pruning or pruning.selection in DRAWN:
            return None
        tokens = last.plan.prompt_tokens
        is_same = len(ids) == tokens and self._ids[:tokens] == list(ids) and has_first(self.cache, tokens)
        return last if is_same else None

    def shared(self, ids: Sequence[int]) -> tuple[int, str]:
        """How many of a prompt's first tokens need not be computed again, all but one at most; and where these are
        fewer than the earlier turns had, why."""
        if not self._ids:
            return 0, ""
        same = next((i for i, pair in enumerate(zip(self._ids, ids, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(self._ids), len(ids) - 1) if same is None else same
        states = kept_points(self.cache)
        points = [point for point in (self._statistics or states or [same]) if 0 < point <= same]
        if not points:
            return 0, "what is kept of it begins differently"
        tokens = max((point for point in points if has_first(self.cache, point)), default=0)
        moved = "its sliding windows have moved on" if states is None else "its recurrent state has moved on"
        return (tokens, "") if tokens else (0, moved)

    def statistics(self, tokens: int, kept: Kept, neurons: Kept) -> Statistics | None:
        """Those of the first tokens, if they are known for all blocks of which less than the `neurons` are `kept`."""
        known = self._statistics.get(tokens)
        return None if known is None else covering(known, kept, neurons)

    def go_back(self, tokens: int, room: int, devices: Sequence[str] = ()) -> None:
        """Keep the first `tokens` tokens alone, in memory for `room` tokens, layer i on devices[i]."""
        self._ids = self._ids[:tokens]
        self._statistics = {end: totals for end, totals in self._statistics.items() if end <= tokens}
        cut_back(self.cache, tokens, room, devices)

    def mark(self, cache: Any, plan: Plan) -> None:
        """Before the pass of a turn, by whose cache: recurrent states are kept for the points to go back to."""
        if plan.continues:
            mark(cache, plan.prompt_tokens - REWRITTEN, plan.prompt_tokens)

    def keep(self, cache: Any, ids: Sequence[int], statistics: Mapping[int, Statistics] | None) -> None:
        """After an answer: the cache of a conversation, and its ids as far as the full model computed them.

        `statistics`: of these tokens, and of some that end earlier; empty where nothing was pruned; None: there are no
        new ones."""
        ids = ids[: held_tokens(cache)]
        if not ids:  # transformers was told to use no cache
            self.clear()
            return
        self.cache, self._ids = cache, list(ids)
        if statistics is None:
            return
        points = {**self._statistics, **statistics} if statistics else {}
        self._statistics = dict(sorted(points.items())[-KEPT_STATISTICS:])
