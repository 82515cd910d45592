"""Which layers are on which of several cards, and what each card holds.

The cards are filled one after the other, each with consecutive layers as far as its budget goes, so that the states of
a token move from card to card once. What a card holds is the plan of a model that has these layers alone."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..memory.machine import device_budget, held_memory, how_known
from ..memory.out_of_memory import planned
from ..units import MIB, parse_budget
from .request import Card, Request
from .rows import Row, peak_bytes, plan_rows
from .sizes import Kept, ModelSizes


@dataclass(frozen=True)
class CardPlan:
    """What a run holds on one card: the layers from `begin` to `end` - 1."""

    card: Card
    begin: int
    end: int
    rows: tuple[Row, ...]

    @property
    def peak(self) -> int:
        """Predicted peak, bytes."""
        return peak_bytes(self.rows)

    @property
    def fits(self) -> bool:
        return self.peak <= self.card.budget

    @property
    def layers(self) -> str:
        """'layers 0 to 23', or 'no layer'."""
        if self.begin == self.end:
            return "no layer"
        last = self.end - 1
        return f"layer {last}" if self.begin == last else f"layers {self.begin} to {last}"

    def to_json(self, rows: bool = True) -> dict[str, Any]:
        """`layers`: from the first of the two to the one before the second."""
        own = {"device": str(self.card), "layers": [self.begin, self.end]}
        sizes = {"planned_peak_bytes": self.peak, "budget_bytes": self.card.budget}
        return own | sizes | ({"rows": [asdict(row) for row in self.rows]} if rows else {})


def card_here(device: str, size: int | str | None) -> Card:
    """A device with the budget that was asked for, or with what is free there. Raises OptionError, BudgetError."""
    with planned(device):  # a GPU may be too full for as much as its context
        held = held_memory(device)
    return Card(device, device_budget(device) if size is None else parse_budget(size), held, how_known(device))


def placed(sizes: ModelSizes, request: Request, kept: Kept) -> tuple[CardPlan, ...]:
    """Where the layers are, card by card: as they are in memory, where that fits; the last card takes what the others
    have no room for, whether or not that fits. Empty for one device."""
    if not request.cards:
        return ()
    in_memory = request.earlier.ends if request.earlier else ()
    if len(in_memory) == len(request.cards):
        found = _cut(sizes, request, kept, in_memory)
        if all(card.fits for card in found):
            return found
    return _cut(sizes, request, kept, spans(sizes, request, kept))


def spans(sizes: ModelSizes, request: Request, kept: Kept) -> list[int]:
    """For each card the layer behind its last one. The first card has one layer at least."""
    layers, ends = len(kept), list[int]()
    for card in request.cards[:-1]:
        begin = ends[-1] if ends else 0
        peak = partial(_peak, sizes, request, kept, card, begin)
        count = bisect_right(range(begin + 1, layers + 1), card.budget, key=peak)
        ends.append(begin + max(count, 0 if ends else 1))
    return [*ends, layers]


def least_budget(sizes: ModelSizes, request: Request, kept: Kept) -> int:
    """Bytes that would be enough on every card, up to a MiB."""
    most = max(_peak(sizes, request, kept, card, 0, len(kept)) for card in request.cards)

    def fits(mib: int) -> bool:
        cards = tuple(replace(card, budget=mib * MIB) for card in request.cards)
        asked = replace(request, cards=cards)
        return all(card.fits for card in _cut(sizes, asked, kept, spans(sizes, asked, kept)))

    low, high = 0, -(-most // MIB)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * MIB


def summed(cards: Iterable[CardPlan]) -> tuple[Row, ...]:
    """The rows of all cards together."""
    found: dict[tuple[str, str], Row] = {}
    for row in (row for card in cards for row in card.rows):
        before = found.get((row.name, row.when))
        found[row.name, row.when] = replace(before, bytes=before.bytes + row.bytes) if before else row
    return tuple(found.values())


def _cut(sizes: ModelSizes, request: Request, kept: Kept, ends: Sequence[int]) -> tuple[CardPlan, ...]:
    each = zip(request.cards, [0, *ends[:-1]], ends, strict=True)
    return tuple(CardPlan(card, begin, end, _rows(sizes, request, kept, card, begin, end)) for card, begin, end in each)


def _peak(sizes: ModelSizes, request: Request, kept: Kept, card: Card, begin: int, end: int) -> int:
    return peak_bytes(_rows(sizes, request, kept, card, begin, end))


def _rows(sizes: ModelSizes, request: Request, kept: Kept, card: Card, begin: int, end: int) -> tuple[Row, ...]:
    """The rows of a card; those of the host's RAM are told with the first one."""
    static = request.static and (begin, end) == (0, len(kept))  # no step over several cards is recorded
    asked = replace(request, runtime=card.runtime, runtime_note=card.runtime_note, static=static)
    if begin == end:
        return (plan_rows(sizes, asked, kept)[0],)
    rows = plan_rows(sizes.of_layers(begin, end), asked, kept[begin:end])
    return rows if begin == 0 else tuple(row for row in rows if row.when != "host")
