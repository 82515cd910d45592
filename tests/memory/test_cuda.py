"""A card's memory, told truly: the context, the budget, the peak of each run, what other processes hold."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from card import Card, install

from griffin_offload.errors import BudgetError, OptionError
from griffin_offload.memory import cuda
from griffin_offload.memory.machine import (
    VARIABLE,
    best_device,
    cards,
    device_budget,
    devices_of,
    held_memory,
    how_known,
)
from griffin_offload.memory.measure import PeakMeter
from griffin_offload.memory.out_of_memory import planned
from griffin_offload.planning.catalogue_fit import catalogue_sizes
from griffin_offload.planning.plan import make_plan
from griffin_offload.planning.request import Request
from griffin_offload.sources.resolve import CATALOGUE
from griffin_offload.units import GIB, MIB, parse_bytes


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    yield Card().install(monkeypatch)
    cuda.context.cache_clear()


def test_the_context_is_what_nvml_sees_before_and_after(card: Card) -> None:
    assert cuda.context("cuda") == (450 * MIB, True)
    card.others += 5 * GIB  # later it is not measured again
    assert cuda.context("cuda") == (450 * MIB, True)
    card.take(GIB)
    assert held_memory("cuda") == GIB + 450 * MIB
    assert cuda.others("cuda") == card.others
    assert how_known("cuda") == "measured"


@pytest.mark.parametrize("why", ["without NVML", "the context is there", "another process takes", "or frees"])
def test_where_it_cannot_be_measured_it_is_estimated(card: Card, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "without NVML":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    elif why == "the context is there":
        card.started = True
    else:
        ones, change = torch.ones, 3 * GIB if "takes" in why else -GIB

        def meanwhile(*shape: int, **options: object) -> torch.Tensor:
            card.others += change
            return ones(*shape, **options)

        monkeypatch.setattr(torch, "ones", meanwhile)
    assert cuda.context("cuda") == (cuda.ESTIMATE, False)
    assert how_known("cuda") == "estimated"


def test_the_budget_is_what_we_hold_and_most_of_what_is_free(card: Card) -> None:
    free = card.total - card.others - card.context
    assert device_budget("cuda") == card.context + int(0.95 * free)
    card.take(4 * GIB)
    card.free(GIB)  # kept by the allocator, as good as free
    assert device_budget("cuda") == card.context + 3 * GIB + int(0.95 * (free - 3 * GIB))


def test_the_plan_counts_the_context(card: Card) -> None:
    """What the process holds on a card is a row of its name; the margin has room for cuBLAS."""
    sizes = catalogue_sizes({**CATALOGUE["llama-2-7b"].config, "num_hidden_layers": 2})
    request = Request(100, 10, 0.5, device_budget("cuda"), "cuda", held_memory("cuda"), how_known("cuda"), copies=True)
    plan = make_plan(sizes, request)
    assert (plan.rows[0].name, plan.rows[0].bytes, plan.rows[0].note) == (
        "CUDA context and libraries",
        450 * MIB,
        "measured",
    )
    less = make_plan(sizes, replace(request, runtime=0))
    assert plan.peak == less.peak + 450 * MIB
    assert plan.rows[-1].bytes >= make_plan(sizes, replace(request, device="cpu")).rows[-1].bytes + 32 * MIB
    assert make_plan(sizes, replace(request, device="cpu")).rows[0].name == "Python and libraries"


def test_each_run_has_its_own_peak(card: Card) -> None:
    """A small run after a large one, whose blocks the allocator keeps."""
    large = PeakMeter("cuda")
    card.take(9 * GIB)
    card.free(9 * GIB)
    assert large.peak() == 9 * GIB + card.context
    small = PeakMeter("cuda")
    card.take(GIB)
    assert small.peak() == GIB + card.context
    card.free(GIB)
    card.take(2 * GIB)
    card.free(2 * GIB)
    assert small.peak() == 2 * GIB + card.context


def test_what_others_hold_is_told_before_anything_is_read(card: Card) -> None:
    def run(peak: int) -> str:
        with planned("cuda", peak):
            return "ran"

    room = card.total - card.others
    assert run(room) == "ran"
    with pytest.raises(BudgetError, match=r"22\.00 GiB are left. Give --device-memory \d+MiB") as caught:
        run(room + 1)
    assert "other processes hold 2.00 GiB" in str(caught.value)
    assert room - 100 * MIB < parse_bytes(str(caught.value).split("--device-memory ")[1]) < room
    card.take(9 * GIB)  # of the last prompt, and as planned
    card.free(GIB)
    assert run(room) == "ran"
    card.others += 1
    with pytest.raises(BudgetError):
        run(room)


def test_out_of_memory_on_a_card(card: Card) -> None:
    unloaded = []

    def run() -> None:
        card.take(GIB)
        card.free(GIB)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    told = r"cuda is out of memory: 1\.00 GiB were planned, 2\d\.\d+ GiB is free"
    with pytest.raises(BudgetError, match=told), planned("cuda", GIB, lambda: unloaded.append(True)):
        run()
    assert unloaded == [True]
    assert card.cached == 0, "given back to the card"


def test_a_card_without_room_for_a_context(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: int, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    with pytest.raises(BudgetError, match="cuda is out of memory: nothing is free"), planned("cuda"):
        pass


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Card]]:
    cards = [Card(), Card(total=12 * GIB, others=GIB, context=300 * MIB)]
    install(cards, monkeypatch)
    yield cards
    cuda.context.cache_clear()


def test_each_card_has_its_own_context_budget_and_peak(two_cards: list[Card]) -> None:
    first, second = two_cards
    meters = [PeakMeter("cuda"), PeakMeter("cuda:1")]
    assert cuda.context("cuda:1") == (300 * MIB, True), "measured, though the process uses CUDA already"
    first.take(3 * GIB)
    second.take(GIB)
    assert [meter.peak() for meter in meters] == [3 * GIB + first.context, GIB + second.context]
    assert [held_memory(device) for device in ("cuda", "cuda:1")] == [meter.peak() for meter in meters]
    assert device_budget("cuda:1") == GIB + 300 * MIB + int(0.95 * (10 * GIB - 300 * MIB))
    assert device_budget("cuda") == 3 * GIB + 450 * MIB + int(0.95 * (19 * GIB - 450 * MIB))


def test_the_card_that_others_fill_is_named(two_cards: list[Card]) -> None:
    def run(peaks: dict[str, int]) -> str:
        with planned("cuda", sum(peaks.values()), cards=peaks):
            return "ran"

    assert run({"cuda": 22 * GIB, "cuda:1": 11 * GIB}) == "ran"
    two_cards[1].others += GIB
    with pytest.raises(BudgetError, match=r"11\.00 GiB are planned on cuda:1, .* 10\.00 GiB are left"):
        run({"cuda": 22 * GIB, "cuda:1": 11 * GIB})


def test_the_gpus_of_a_text(two_cards: list[Card], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    both = ("cuda", "cuda:1")
    assert devices_of("all") == devices_of("CUDA:0, cuda:1") == both
    assert devices_of("cuda:0") == devices_of("cuda") == devices_of(None) == ("cuda",)
    monkeypatch.setenv(VARIABLE, "all")
    assert devices_of(None) == both
    assert devices_of("cpu") == ("cpu",)
    with pytest.raises(OptionError, match="GRIFFIN_DEVICE: all is several devices, and this runs on one"):
        best_device()


@pytest.mark.parametrize(
    ("names", "count", "told"),
    [
        ("cuda:0,cuda:2", 2, "there is no GPU 'cuda:2' here; there is: cuda:0 to cuda:1"),
        ("cuda:0,cpu", 2, "'cpu' is no GPU: give cpu or mps alone, or GPUs such as cuda:0,cuda:1"),
        ("cpu,cpu", 0, "'cpu' is no GPU"),
        ("cuda:0,", 2, "'' is no GPU"),
        ("cuda:0,cuda:0", 2, "names a GPU twice"),
        ("cuda:2,cuda:1", 4, "set CUDA_VISIBLE_DEVICES=2,1 and give cuda:0,cuda:1"),
        ("cuda:1", 2, "set CUDA_VISIBLE_DEVICES=1 and give cuda$"),
        ("cuda:1", 1, "there is: cuda$"),
        ("cuda:0", 0, "there is: no GPU$"),
        ("all", 0, "there is no GPU here"),
    ],
)
def test_gpus_that_cannot_be_used_together_are_refused(names: str, count: int, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        cards(names.split(","), count)
