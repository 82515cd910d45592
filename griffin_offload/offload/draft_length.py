"""When drafting should stop and the full model should verify: as soon as another token would cost more than it gives.

Drafting another token takes t_d seconds, and gives a token with the probability that it and all before it are accepted.
The best that can be had for these seconds is what whole rounds give, tokens a second: so draft on while
P(accepted so far and next) > rate * t_d. That is the optimal stopping rule of a renewal process whose rate is the best
there is. All of it is measured as the answer goes on."""

from bisect import bisect_right
from collections.abc import Sequence

from ..planning.lossless import best_rate

EDGES = (0.5, 0.8, 0.9, 0.97, 0.99)  # of the draft's own probability of its token
ACCEPTED = (0.6, 0.79, 0.92, 0.98, 0.993, 0.998)  # between them, before any was seen: as SubSpec's logs have it
SEEN = 4.0  # tokens that this counts as
LATEST = 0.3  # weight of the latest round's seconds


class DraftLength:
    """Learns from each round; `goes_on` tells whether to draft another token."""

    def __init__(self, most: int, acceptance: float, draft_s: float, pass_s: float, clock: bool = True) -> None:
        """What to expect before the first round: of a token, and seconds of a drafted one and of a pass. `clock`: they
        are corrected by what was measured; not so where another run is to draft as this one did."""
        self._most = most
        self._draft_s, self._pass_s = draft_s, pass_s
        self._tried, self._accepted = [SEEN] * len(ACCEPTED), [SEEN * each for each in ACCEPTED]
        self._all_tried, self._all_accepted = SEEN, SEEN * acceptance
        self._clock, self._timed = clock, False
        self._update_rate()

    def acceptance(self, probability: float) -> float:
        """The chance that a token is accepted which the draft gave this probability."""
        place = bisect_right(EDGES, probability)
        return self._accepted[place] / self._tried[place]

    def goes_on(self, survival: float) -> bool:
        """Whether another token is worth its time, where those so far are all accepted with this chance."""
        return survival * self._mean > self.rate * self._draft_s

    def learn(self, probabilities: Sequence[float], accepted: int, draft_s: float, pass_s: float) -> None:
        """Of a round: its drafts by their probabilities, of which the first `accepted` were; seconds of all drafts, and
        of the pass."""
        for number, probability in enumerate(probabilities[: accepted + 1]):
            place, good = bisect_right(EDGES, probability), float(number < accepted)
            self._tried[place] += 1
            self._accepted[place] += good
            self._all_tried += 1
            self._all_accepted += good
        if self._clock and probabilities:
            latest = LATEST if self._timed else 1.0
            self._pass_s += latest * (pass_s - self._pass_s)
            self._draft_s += latest * (draft_s / len(probabilities) - self._draft_s)
            self._timed = True
        self._update_rate()

    @property
    def _mean(self) -> float:
        return self._all_accepted / self._all_tried

    def _update_rate(self) -> None:
        """Tokens a second at the best number of drafts."""
        self.rate = best_rate(self._mean, self._draft_s, self._pass_s, self._most)
