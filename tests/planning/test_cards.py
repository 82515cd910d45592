"""Layers on several cards (griffin_offload.planning.cards), in the shape of a model of 13 billion parameters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from griffin_offload.errors import BudgetError
from griffin_offload.options import Pruning
from griffin_offload.planning.cards import least_budget, placed, spans
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.planning.ladder import best_plan
from griffin_offload.planning.plan import choose_plan, make_plan
from griffin_offload.planning.request import Card, Earlier, Request
from griffin_offload.planning.rows import peak_bytes, plan_rows
from griffin_offload.quant.precision import precision
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import GIB, MIB, parse_bytes

SIZES = catalogue_sizes(CATALOGUE["llama-2-13b"].config)
LAYERS = len(SIZES.layers)
CONTEXT = 450 * MIB


def asked(*budgets: int, **options: Any) -> Request:
    """A request of cards with these budgets."""
    cards = tuple(Card(f"cuda:{i}" if i else "cuda", budget, CONTEXT) for i, budget in enumerate(budgets))
    common = {"device": "cuda", "runtime": CONTEXT, "copies": True, "static": True, "cards": cards, **options}
    return Request(512, 256, 0.0, sum(budgets), **common)


def peaks_one_by_one(request: Request, ends: Sequence[int]) -> list[int]:
    """The slow way: the peak of each card, from the rows of a model that has its layers alone."""
    kept, found = request.kept(SIZES), []
    for begin, end in zip([0, *ends], ends, strict=False):
        static = request.static and (begin, end) == (0, LAYERS)
        part = replace(request, static=static)
        found.append(peak_bytes(plan_rows(SIZES.of_layers(begin, end), part, kept[begin:end])) if end > begin else 0)
    return found


@pytest.mark.parametrize("budgets", [(16, 16), (12, 18), (9, 9, 9, 9), (5, 26), (2, 30), (30, 8)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_each_card_has_as_many_layers_as_fit(budgets: tuple[int, ...], sparsity: float) -> None:
    """Against every cut, tried layer by layer."""
    request = replace(asked(*(budget * GIB for budget in budgets)), sparsity=sparsity)
    expected, begin = list[int](), 0
    for number, budget in enumerate(budgets[:-1]):
        end = begin + (number == 0)
        while end < LAYERS and peaks_one_by_one(request, [begin, end + 1])[1] <= budget * GIB:
            end += 1
        expected.append(end)
        begin = end
    found = spans(SIZES, request, request.kept(SIZES))
    assert found == [*expected, LAYERS]


def test_a_model_that_fits_two_cards_but_not_one_is_resident_on_both() -> None:
    one = make_plan(SIZES, replace(asked(), budget=16 * GIB, cards=()))
    plan = choose_plan(SIZES, asked(16 * GIB, 16 * GIB), 0.0, "m")
    assert (one.fits, plan.fits, plan.fits_whole, plan.prunes) == (False, True, True, False)
    assert plan.resident_bytes == one.resident_bytes
    first, second = plan.cards
    assert 0 < first.end == second.begin < second.end == LAYERS
    assert plan.peak == first.peak + second.peak == sum(peaks_one_by_one(asked(16 * GIB, 16 * GIB), plan.ends))
    assert 16 * GIB - plan.layers[0].full_bytes < first.peak <= 16 * GIB
    assert plan.devices == ("cuda",) * first.end + ("cuda:1",) * (LAYERS - first.end)
    weights = ("attention and norms", "kept neurons", "embeddings, final norm, lm_head")
    held = [sum(row.bytes for row in rows if row.name in weights) for rows in (plan.rows, first.rows, second.rows)]
    assert held[0] == sum(held[1:]) == plan.resident_bytes
    assert dict.fromkeys(row.when for row in second.rows).keys().isdisjoint({"host"}), "RAM is told once"


def test_where_the_first_card_is_enough_the_plan_is_that_of_one() -> None:
    one, two = make_plan(SIZES, replace(asked(), budget=30 * GIB, cards=())), make_plan(SIZES, asked(30 * GIB, 8 * GIB))
    assert two.cards[0].rows == one.rows
    assert (two.ends, two.cards[1].peak, two.cards[1].layers) == ((LAYERS, LAYERS), CONTEXT, "no layer")
    assert [row.name for row in two.rows if row.name == "recorded steps"], "a token is recorded on one card"
    assert "recorded steps" not in {row.name for row in make_plan(SIZES, asked(16 * GIB, 16 * GIB)).rows}


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    """The --device-memory that the error names is enough, and 2 % less is not; so is the sparsity."""
    with pytest.raises(BudgetError) as caught:
        choose_plan(SIZES, asked(8 * GIB, 8 * GIB), 0.0, "m")
    told = str(caught.value)
    assert "\n" not in told
    assert "on cuda:1 (512 + 256 tokens); the budget is 8.00 GiB there. It fits with --sparsity 0." in told
    share = float(told.split("--sparsity ")[1].split(",", maxsplit=1)[0])
    assert make_plan(SIZES, replace(asked(8 * GIB, 8 * GIB), sparsity=share)).fits
    assert not make_plan(SIZES, replace(asked(8 * GIB, 8 * GIB), sparsity=share - 0.02)).fits
    enough = parse_bytes(told.split("--device-memory ")[1])
    assert make_plan(SIZES, asked(enough, enough)).fits
    assert not make_plan(SIZES, asked(enough * 98 // 100, enough * 98 // 100)).fits


def test_the_least_equal_budget_is_the_least() -> None:
    for runtime in (CONTEXT, 20 * GIB):  # with so much on the first card, it sets the least
        request = asked(8 * GIB, 8 * GIB, 8 * GIB)
        request = replace(request, cards=(replace(request.cards[0], runtime=runtime), *request.cards[1:]))
        least = least_budget(SIZES, request, request.kept(SIZES))
        for budget, fits in ((least, True), (least - MIB, False)):
            now = replace(request, cards=tuple(replace(card, budget=budget) for card in request.cards))
            assert all(card.fits for card in placed(SIZES, now, request.kept(SIZES))) is fits


def test_the_ladder_climbs_over_both_cards() -> None:
    """Two cards of 8 GiB keep more than one of them, and no less than one of 14 GiB."""
    eight, both, more = (
        best_plan(SIZES, request, Pruning(), "m")
        for request in (
            replace(asked(), budget=8 * GIB, cards=()),
            asked(8 * GIB, 8 * GIB),
            replace(asked(), budget=14 * GIB, cards=()),
        )
    )
    assert eight.resident_bytes < both.resident_bytes
    assert (both.precision, both.sparsity) == (more.precision, more.sparsity)
    with pytest.raises(BudgetError, match=r"m needs at least .* on cuda:0 \(int4.*the budget is 2\.00 GiB there"):
        best_plan(SIZES, asked(2 * GIB, 2 * GIB), Pruning(), "m")


def test_the_next_turn_leaves_the_layers_where_they_are_if_it_can() -> None:
    earlier = Earlier(100, ends=(10, LAYERS))
    stays = make_plan(SIZES, asked(16 * GIB, 26 * GIB, earlier=earlier, precision=precision("bfloat16", "drop")))
    assert stays.ends == (10, LAYERS)
    moves = make_plan(SIZES, asked(16 * GIB, 16 * GIB, earlier=earlier))
    assert moves.fits
    assert moves.ends[0] > 10
